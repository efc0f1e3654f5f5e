"""The disk fails: injected OSErrors, a limit on the size of files, a workdir that goes away.

One message; the newest valid step stays; once the disk is well again the same command ends where the whole run did.
"""

import builtins
import collections
import contextlib
import errno
import io
import os
import random
import resource
import shutil
import threading
import time

import numpy as np

from molora_jax.errors import InputError
from molora_jax.runs.checkpoints import Checkpoints
from tests.faults.common import changed, digests, finished_run, limited, scratch, start, tiny_config
from tests.faults.report import each, misnamed

CALLS = ("open", "fsync", "rename", "replace", "mkdir", "write", "unlink")
ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT, errno.EFBIG, errno.ENOENT)
THREADS_SECONDS = 10


class Injector:
    """Fails the `nth` call below `folder` that is of one kind, and those after it until there were `times`.

    `seen` counts the calls of every kind, so that a run without a fault (`times=0`) says how many there are.
    """

    def __init__(self, folder, call="", nth=0, times=0, number=errno.EIO):
        self.folder, self.call, self.left, self.times, self.number = str(folder), call, nth, times, number
        self.hits, self.seen = 0, collections.Counter()
        self._own = threading.local()

    def check(self, call, path):
        if getattr(self._own, "busy", False):
            return
        self._own.busy = True
        try:
            if isinstance(path, int):
                path = os.readlink(f"/proc/self/fd/{path}") if path > 2 else ""
            inside = str(os.fspath(path)).startswith(self.folder)
        except (OSError, TypeError):
            inside = False
        finally:
            self._own.busy = False
        self.seen[call] += inside
        if inside and call == self.call:
            self.left -= 1
            if self.left < 0 and self.hits < self.times:
                self.hits += 1
                raise OSError(self.number, os.strerror(self.number), str(path))

    @contextlib.contextmanager
    def active(self):
        def failing(function, call):
            def wrapped(path, *args, **kwargs):
                mode = args[0] if args else kwargs.get("mode", "r")
                if call != "open" or (isinstance(mode, str) and set(mode) & set("wax+")) or isinstance(mode, int):
                    self.check(call, path)
                return function(path, *args, **kwargs)

            return wrapped

        names = [name for name in CALLS if name != "write"]
        with changed(os, **{name: failing(getattr(os, name), name) for name in names}):
            opened = self._writing(failing(builtins.open, "open"))
            with changed(builtins, open=opened), changed(io, open=opened):
                yield self

    def _writing(self, function):
        """Text files whose `write` can fail (what Python buffers for binary files fails at their end, as fsync)."""

        def wrapped(path, mode="r", *args, **kwargs):
            file = function(path, mode, *args, **kwargs)
            if set(mode) & set("wax+") and isinstance(path, (str, os.PathLike)):
                return _Failing(file, lambda: self.check("write", path))
            return file

        return wrapped


class _Failing:
    """A file whose `write` asks first."""

    def __init__(self, file, ask):
        self._file, self._ask = file, ask

    def write(self, content):
        self._ask()
        return self._file.write(content)

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        self._file.__enter__()
        return self

    def __exit__(self, *error):
        return self._file.__exit__(*error)

    def __iter__(self):
        return iter(self._file)


def planned(seen, folder, rng) -> Injector:
    """A fault at one of the calls that a whole run makes, each kind as likely."""
    call = rng.choice([name for name in CALLS if seen[name]])
    return Injector(folder, call, rng.randrange(seen[call]), rng.choice((1, 1, 2, 100_000)), rng.choice(ERRORS))


def _tree(step):
    rng = np.random.default_rng(step)
    return {
        "adapters": {f"leaf{i}": rng.standard_normal(2000).astype(np.float32) for i in range(3)},
        "train": {"s": step},
    }


def _is(checkpoints, step) -> bool:
    got = checkpoints.restore(step, _tree(step))
    return all((got["adapters"][k] == v).all() for k, v in _tree(step)["adapters"].items())


def checkpoint(seed, tries):
    """One save that fails anywhere: it is known, older steps stay, temporaries go, the next save works."""

    def save_two(folder, fault):
        checkpoints = Checkpoints(folder, keep=2, warn=lambda text: None)
        checkpoints.save(1, _tree(1), meta={}, wait=True)
        with fault as injector:
            checkpoints.save(2, _tree(2), meta={"samples": 2}, best=True, wait=True)
        return checkpoints, injector

    with scratch() as path:
        seen = save_two(path, Injector(path).active())[1].seen

    def one(number):
        rng = random.Random(number)
        with scratch() as path:
            folder = path / "checkpoints"
            if number % 5 == 0:
                fault = limited(resource.RLIMIT_FSIZE, limit=rng.choice((0, 100, 1000, 5000)))
            else:
                fault = planned(seen, folder, rng).active()
            checkpoints, injector = save_two(folder, fault)
            hit = injector is None or injector.hits
            step = checkpoints.newest_valid()
            if step not in (1, 2) or not _is(checkpoints, step):
                return f"the newest valid step is {step}"
            if step == 1 and not checkpoints.failures:
                return "a save that failed was not known" if hit else "step 2 is gone"
            before = len(checkpoints.failures)
            checkpoints.save(3, _tree(3), meta={}, wait=True)
            if checkpoints.newest_valid() != 3 or not _is(checkpoints, 3) or len(checkpoints.failures) != before:
                return f"the save after it failed: {checkpoints.failures}"
            left = [p.name for p in folder.iterdir() if not p.name.isdecimal() and p.name != "best.json"]
            return f"left behind: {left}" if left else ""

    return each(seed, tries, one)


def run(seed, tries):
    """A disk that fails somewhere in a whole run, from its lock to its picture."""
    whole = finished_run()
    with scratch() as path:
        with Injector(path / "run").active() as counter:
            start(tiny_config(eval_every=4), path / "run")

    def one(number):
        rng = random.Random(number)
        with scratch() as path:
            if number % 6 == 5:
                fault = limited(resource.RLIMIT_FSIZE, limit=rng.choice((500, 3000, 20_000)))
            else:
                fault = planned(counter.seen, path / "run", rng).active()
            before, said = threading.enumerate(), ""
            try:
                with fault:
                    result, _ = start(tiny_config(eval_every=4), path / "run")
                said = f"step {result.step}"
            except InputError as error:
                said = str(error)
                if misnamed(error) or said.count("\n") > 12:
                    return misnamed(error) or f"a message of {said.count(chr(10))} lines"
            wrong = _as_the_whole(path / "run", whole, said)
            return wrong or _threads(before)

    return each(seed, tries, one)


def gone(seed, tries):
    """The workdir is removed in the middle of a run: the run ends with an error."""

    def one(number):
        from molora_jax.training import loop

        with scratch() as path:
            put_batch, calls, before = loop.sharding.put_batch, [], threading.enumerate()

            def removing(*args):
                calls.append(None)
                if len(calls) == 2 + number % 3:
                    shutil.rmtree(path / "run", ignore_errors=True)
                return put_batch(*args)

            with changed(loop.sharding, put_batch=removing):
                try:
                    result, notes = start(tiny_config(), path / "run")
                except InputError as error:
                    return misnamed(error) or _threads(before)
            return f"the run ended with step {result.step}: {notes[-2:]}"

    return each(seed, tries, one)


def _bits(run, step):
    """Every leaf but the best loss so far: a best step that could not be saved is not the one to beat."""
    return {name: digest for name, digest in digests(run, step).items() if name != "train/best"}


def _as_the_whole(run, whole, said):
    """What is on the disk is a part of the whole run, and the same command completes it."""
    checkpoints = Checkpoints(run / "checkpoints", keep=9, warn=lambda text: None)
    steps = checkpoints.steps()
    for step in steps:
        if checkpoints.valid(step)[0] and _bits(run, step) != _bits(whole, step):
            return f"step {step} differs from the whole run ({said})"
    if steps and not any(checkpoints.valid(step)[0] for step in steps):
        return f"no valid step is left ({said})"
    if run.exists():
        start(tiny_config(eval_every=4), run)
        if _bits(run, 6) != _bits(whole, 6):
            return f"the run that went on differs from the whole one ({said})"
    return ""


def _threads(before):
    """No new thread that would keep the process alive."""
    deadline = time.monotonic() + THREADS_SECONDS
    while time.monotonic() < deadline:
        alive = [t.name for t in threading.enumerate() if not t.daemon and t not in before]
        if not alive:
            return ""
        time.sleep(0.1)
    return f"threads that keep the process: {alive}"
