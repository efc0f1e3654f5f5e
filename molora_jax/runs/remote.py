"""A run whose workdir is on an object store: it works in a folder of this machine, and the store holds what counts.

    URL/lock/<generation>        who writes here: a put that succeeds once, again every 15 s; a lease of 60 s
    URL/checkpoints/<step>/...   the manifest last; a step without one is not there. Deleted the other way round
    URL/metrics/<part>           metrics.jsonl in parts of 1 MB: only the last one is put again
    URL/...                      every other file (config.json, identity.json, tensorboard/, ...), when it changed

A start takes the lease, brings the folder to what the store holds (what is there already is not read again) and goes
on as on a disk. A step counts once its manifest is in the store: a save that did not get there failed. No clock is
read: a lease is over when its object has not changed for so long.
"""

import concurrent.futures
import json
import os
import pathlib
import re
import secrets
import socket
import threading
import time

from molora_jax import stores
from molora_jax.errors import InputError
from molora_jax.runs.manifest import NAME as MANIFEST

LEASE, RENEW = 60.0, 15.0  # seconds: of a lease that nobody renews, and between two renewals
PART = 1_000_000  # bytes of a part of metrics.jsonl
AT_ONCE = 8  # objects of a step that are put at the same time
METRICS, CHECKPOINTS, LOCK = "metrics.jsonl", "checkpoints", "lock"
_STEP_FILE = re.compile(rf"{CHECKPOINTS}/(\d+)/")
_TEMPORARY = re.compile(r"(^|/)\.|/(saving|old|deleting)-\d+/")
_PART_NAME = re.compile(r"metrics/(\d{6})\.jsonl")


class Lease:
    """Who may write below a URL. Generations count up; the highest is the one that holds."""

    def __init__(self, store: stores.Store, *, note):
        self.store, self.note, self.generation = store, note, 0
        self.me = f"process {os.getpid()} on {socket.gethostname()}"
        self.nonce, self._lost, self._beat = secrets.token_hex(8), "", 0

    def take(self, *, dead: str = ""):
        """Waits for a lease that is not renewed to be over.

        Args:
          dead: a nonce that cannot be alive any more (its process was on this machine and holds no lock here).

        Raises:
          InputError: somebody renews it. OSError: the store refuses.
        """
        began, seen = time.monotonic(), None
        while True:
            held = self._newest()
            if held is None:
                return self._make(1)
            generation, text = held
            holder = _parsed(text)
            if holder.get("released") or holder.get("nonce") == dead:
                return self._make(generation + 1)
            if seen is None:
                self.note(f"{self.store.url} was in use by {holder.get('holder')}; seeing whether it still is")
            elif held != seen:
                raise self._in_use(holder.get("holder", "another process"))
            elif time.monotonic() - began >= LEASE:
                return self._make(generation + 1)
            seen = held
            time.sleep(min(1.0, RENEW / 4))

    def _make(self, generation: int):
        if not self.store.create(self._text(), self._name(generation)):
            held = self._newest()
            raise self._in_use(_parsed(held[1]).get("holder", "another process") if held else "another process")
        self.generation = generation
        self.store.delete(name for name in self.store.list(LOCK) if _generation(name) < generation)

    def _in_use(self, holder):
        return InputError(
            "workdir", got=f"{self.store.url}, in use by {holder}", expected="a folder that no other run writes to",
            fix="Stop that run, or choose another workdir.",
        )  # fmt: skip

    def _newest(self) -> tuple[int, bytes] | None:
        names = sorted(self.store.list(LOCK), key=_generation)
        if not names:
            return None
        try:
            return _generation(names[-1]), self.store.read(names[-1])
        except FileNotFoundError:  # given way to the next one just now
            return self._newest()

    def renew(self):
        """Says that the holder lives. Raises InputError where another one has taken over."""
        self.check()
        self._beat += 1
        self.store.put(self._text(), self._name(self.generation))

    def check(self):
        """Raises InputError where another process has taken the lease."""
        newest = max(map(_generation, self.store.list(LOCK)), default=0)
        if newest != self.generation:
            self._lost = self._lost or f"generation {newest} of its lock is not ours"
        if self._lost:
            raise InputError(
                "workdir", got=f"{self.store.url}, taken over by another process ({self._lost})",
                expected="a folder that no other run writes to",
                fix="See which run writes there; this one was not seen for too long, and ends here.",
            )  # fmt: skip

    def release(self):
        if not self._lost:
            self.store.put(self._text(released=True), self._name(self.generation))

    def _text(self, **more) -> bytes:
        return json.dumps({"holder": self.me, "nonce": self.nonce, "beat": self._beat, **more}).encode()

    @staticmethod
    def _name(generation):
        return f"{LOCK}/{generation:09d}"


def _generation(name: str) -> int:
    last = name.rpartition("/")[2]
    return int(last) if last.isdecimal() else 0


def _parsed(text: bytes) -> dict:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


class Remote:
    """A run's folder `path` here and what of it is below `url`. Made by all processes; one of them is the `writer`.

    Raises InputError while another process has the lease, and where the store does not answer.
    """

    def __init__(self, url: str, path: pathlib.Path, *, writer: bool, note=lambda text: None):
        self.url, self.path, self.writer = url, path, writer
        self._lock, self._stop, self._thread = threading.RLock(), threading.Event(), None
        self._parts: list[bytes] = []  # of metrics.jsonl, as they are in the store
        self._pushed: dict[str, tuple] = {}  # other files: name -> time and size when it was put
        self.lost: InputError | None = None  # set where another process took the lease
        self._told = False
        self.note = note
        try:
            self.store = stores.Store(url)
            if writer:
                self.lease = Lease(self.store, note=note)
                mine = path.parent / "lease"  # the nonce of the process that worked in this folder before
                self.lease.take(dead=mine.read_text() if mine.exists() else "")
                mine.write_text(self.lease.nonce)
            self._pull()
        except OSError as error:
            raise stores.unreachable("workdir", url, error) from error
        if writer:
            self._thread = threading.Thread(target=self._renewing, name="lease", daemon=True)
            self._thread.start()

    def _pull(self):
        found, partial = whole(self.store.list())
        if self.writer:
            self.store.delete(partial)
        fetch(self.store, self.path, found)
        parts = [name for name in found if _PART_NAME.fullmatch(name)]
        self._parts = [self.path.joinpath(name).read_bytes() for name in parts]
        for name in found:
            self._pushed[name] = _stamp(self.path / name)

    # ---- what the run writes -----------------------------------------------------------------------------------------

    def check(self):
        """Raises InputError where the lease is another process's by now."""
        if self.lost is not None:
            raise self.lost

    def push_step(self, step: int):
        """Puts a step that is whole here, its manifest last. Raises OSError or InputError."""
        with self._lock:
            self.check()
            self.push()
            folder = self.path / CHECKPOINTS / str(step)
            own = f"{CHECKPOINTS}/{step}/"
            self._delete(self.store.list(own))
            paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / MANIFEST]
            with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
                list(pool.map(lambda path: self.store.put(path, path.relative_to(self.path).as_posix()), paths))
            self.lease.check()  # nobody else became the writer meanwhile
            self.store.put(folder / MANIFEST, own + MANIFEST)
            best = f"{CHECKPOINTS}/best.json"
            if (self.path / best).exists() and self._pushed.get(best) != _stamp(self.path / best):
                self._put(best)
            stores.note_tags(self.path, self.store.list(own))

    def keep_steps(self, steps: list[int]):
        """Takes away the steps in the store that are not these."""
        with self._lock:
            self.check()
            doomed = [name for name in self.store.list(CHECKPOINTS) if (m := _STEP_FILE.match(name))
                      and int(m[1]) not in steps]  # fmt: skip
            self._delete(doomed)

    def _delete(self, names):
        """Of steps: a manifest goes first, so that what is left of a step is never taken for one."""
        self.store.delete(sorted(names, key=lambda name: not name.endswith(f"/{MANIFEST}")))

    def push(self):
        """Puts every file that changed, but those of steps and temporaries; `metrics.jsonl` by parts."""
        with self._lock:
            self._push_metrics()
            for path in sorted(self.path.rglob("*")):
                name = path.relative_to(self.path).as_posix()
                if not self._is_own(name) and path.is_file() and self._pushed.get(name) != _stamp(path):
                    self._put(name)

    @staticmethod
    def _is_own(name: str) -> bool:
        """Files that are put otherwise, or not at all."""
        return bool(
            name in (METRICS, LOCK, stores.TAGS, f"{CHECKPOINTS}/best.json") or _STEP_FILE.match(name)
            or _TEMPORARY.search(name) or _PART_NAME.fullmatch(name)
        )  # fmt: skip

    def _put(self, name: str):
        path = self.path / name
        stamp = _stamp(path)
        self.store.put(path, name)
        self._pushed[name] = stamp
        stores.note_tags(self.path, {name: self.store.info(name)})

    def _push_metrics(self):
        try:
            with open(self.path / METRICS, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                count = -(-size // PART)
                for number in range(count):
                    file.seek(number * PART)
                    have = self._parts[number] if number < len(self._parts) else None
                    part = file.read(PART)
                    if part != have:
                        self.store.put(part, _part_name(number))
                        self._parts[number : number + 1] = [part]
        except FileNotFoundError:
            return
        if count < len(self._parts):  # a resume cut the file
            self.store.delete(_part_name(number) for number in range(count, len(self._parts)))
            del self._parts[count:]

    def _renewing(self):
        while not self._stop.wait(RENEW):
            try:
                self.lease.renew()
                with self._lock:
                    self._push_metrics()
                self._told = False
            except InputError as error:
                self.lost = error
                return
            except OSError as error:
                if not self._told:
                    self._told = True
                    self.note(f"{self.url} does not answer ({error.strerror or error}): the run goes on")

    def close(self):
        """Puts what is left and gives the lease back. Errors of the store are told: those of a step are elsewhere."""
        if not self.writer or self._stop.is_set():
            return
        self._stop.set()
        if self._thread is not threading.current_thread():
            self._thread.join()
        if self.lost is not None:
            return
        try:
            self.push()
            self.lease.release()
        except (OSError, InputError) as error:
            self.note(f"{self.url}: the last files are not there ({getattr(error, 'strerror', None) or error})")


def whole(found: dict) -> tuple[dict, list[str]]:
    """`(objects of a run, names that a killed save left)`: steps without a manifest are not there."""
    steps = {m[1] for name in found if (m := _STEP_FILE.match(name)) and name == m[0] + MANIFEST}
    kept, partial = {}, []
    for name, at in found.items():
        step = _STEP_FILE.match(name)
        if step and step[1] not in steps:
            partial.append(name)
        elif not name.startswith(f"{LOCK}/"):
            kept[name] = at
    return kept, partial


def fetch(store: stores.Store, path: pathlib.Path, found: dict) -> None:
    """Brings a folder to what the store holds of a run, with `metrics.jsonl` in one piece."""
    stores.mirror(store, path, found)
    parts = sorted(name for name in found if _PART_NAME.fullmatch(name))
    if parts:
        with open(path / METRICS, "wb") as file:
            for name in parts:
                file.write((path / name).read_bytes())


def at_hand(run, *, where: str = "workdir") -> pathlib.Path:
    """A run's folder; of a URL a local copy of it, brought up to date.

    Raises:
      InputError: nothing there, or the store does not answer.
    """
    if not stores.is_url(run):
        return pathlib.Path(run).expanduser()
    stores.served(where, run)
    path = stores.place(run)
    try:
        store = stores.Store(run)
        with stores.alone(path):
            found, _ = whole(store.list())
            if not found:
                fix = "Give the --workdir of a run of launch.train."
                raise InputError(where, got=f"{run!r}, which does not exist", expected="the folder of a run", fix=fix)
            fetch(store, path, found)
    except OSError as error:
        raise stores.unreachable(where, run, error) from error
    return path


def put_back(run, folder: pathlib.Path, below: str) -> None:
    """Puts the files below a subfolder of a run's local copy, such as its report; nothing where it has no URL."""
    if stores.is_url(run):
        store = stores.Store(run)
        for path in sorted((folder / below).rglob("*")):
            if path.is_file() and not _TEMPORARY.search(path.relative_to(folder).as_posix()):
                store.put(path, path.relative_to(folder).as_posix())


def _part_name(number: int) -> str:
    return f"metrics/{number:06d}.jsonl"


def _stamp(path) -> tuple:
    at = os.stat(path)
    return at.st_mtime_ns, at.st_size
