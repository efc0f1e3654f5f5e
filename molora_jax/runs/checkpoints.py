"""Checkpoints of a run: asynchronous, whole or absent, digested, independent of the mesh.

    DIR/<step>/{adapters, opt, router_state, train, ...}    one Orbax item each, one file (or a few) a leaf
    DIR/<step>/manifest.json                                written last (`molora_jax/runs/manifest.py`)
    DIR/best.json                                           {"step": N}, the best step

A step is written as `saving-<step>` and renamed once its manifest is there and its arrays were read back, so a folder
with a step's name was whole when it appeared. It is *valid* while its files are still as the manifest describes them;
`restore` also checks every leaf's digest. Orbax alone notices neither a flipped bit nor a changed dtype.

On several processes every method is called by all of them, on one shared file system. Process 0 writes the manifest,
renames and deletes. With a `remote` (an object store) each process has a folder of its own: what they hold is gathered,
process 0 writes all of it, and a step counts once it is in the store.

Example:
  >>> with Checkpoints("run/checkpoints", keep=2) as checkpoints:
  ...     checkpoints.save(50, {"adapters": adapters, "opt": opt_state}, meta={"samples": 400})
  ...     checkpoints.wait()
  ...     step = checkpoints.newest_valid()
  ...     items = checkpoints.restore(step, {"adapters": adapters, "opt": opt_state})
"""

import contextlib
import dataclasses
import json
import logging
import os
import pathlib
import re
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from molora_jax.errors import InputError
from molora_jax.io import disk
from molora_jax.io.digest import digest
from molora_jax.io.files import sync_folder, write_atomically
from molora_jax.io.plain import from_plain, names, nest, same_names, to_plain
from molora_jax.runs import manifest as manifests
from molora_jax.runs import orbax_quiet
from molora_jax.runs import steps as steps_lib
from molora_jax.runs.manifest import read_manifest
from molora_jax.runs.snapshot import digests_of_shards, gathered, shape_dtype, snapshot
from molora_jax.stores import Unanswered

__all__ = ["Checkpoints", "Failure", "from_plain", "read_manifest", "to_plain"]

LOG = logging.getLogger("molora_jax.checkpoints")
PLACEHOLDER = "empty"  # Orbax refuses an item without a leaf
orbax_quiet.install()


@dataclasses.dataclass(frozen=True)
class Failure:
    """A save that did not become a step (`stage` is "save"), or old steps that could not be deleted ("retention")."""

    step: int
    stage: str
    error: str
    passing: bool = False  # whether trying again may help: a full disk, say


class Checkpoints:
    """The steps below one directory. One writer at a time: `molora_jax.runs.workdir` holds the lock.

    Args:
      directory: made at the first save.
      keep: how many of the newest valid steps stay, beside the best one; at least 1.
      warn: called with a line of text for each failed save and each step that is skipped; a log record by default.
      writer: False only reads: a step that another process is just now replacing is left alone.
      remote: of a run on an object store (`remote.Remote`).
    """

    def __init__(self, directory, *, keep: int, warn=LOG.warning, writer: bool = True, remote=None):
        if keep < 1:
            raise InputError("train.keep", got=f"{keep}", expected="at least 1")
        self.directory = pathlib.Path(directory).absolute()
        self.keep, self.warn, self.writer, self.remote = keep, warn, writer, remote
        self.failures: list[Failure] = []
        self._verified: set[int] = set()  # steps found valid by this object
        self._reported = 0
        self._thread = None
        self._last_failed = False
        self._told_best = ""
        self.silent = False  # no warnings of failed saves, while a caller tries again

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    # Writing

    def save(self, step: int, items: dict, *, meta: dict, best: bool = False, wait: bool = False):
        """Saves a step in the background; an earlier save that is still running is waited for first.

        The values are copied before this returns, so the caller may donate its buffers to the next step. A failure
        shows at the next `save`, `check`, `wait` or `close`: it is warned about once and stays in `failures`; older
        steps stay, temporaries go.

        Args:
          step: the number of optimizer steps done.
          items: name -> pytree of jax or numpy arrays and numbers. Random keys go in as `jax.random.key_data(key)`.
          meta: JSON values for the manifest: `samples` consumed, `config`, `identity` and more.
          best: marks this step as the best one once it is written.
          wait: returns after the step is written (or has failed).
        """
        self.wait()
        host = {name: {k: snapshot(f"{name}/{k}", x) for k, x in names(tree).items()} for name, tree in items.items()}
        self._last_failed = False
        if self._apart:
            host = gathered(host)
        digests = digests_of_shards(host) if self._joined else {}
        self.reached("snapshot")
        if self._apart and jax.process_index() != 0:
            return
        try:
            if jax.process_index() == 0:
                self.directory.mkdir(parents=True, exist_ok=True)
            self._sweep()
            trees = {name: nest(leaves or {PLACEHOLDER: np.zeros((), np.int8)}) for name, leaves in host.items()}
            with _context(alone=self._apart), orbax_quiet.without_peers() if self._apart else contextlib.nullcontext():
                response = ocp.save_checkpointables_async(self._staging(step), trees)
        except Exception as error:  # a full disk shows here or in the thread: one treatment
            self._failed(step, "save", error)
            self.check()
            return
        job = {"step": int(step), "host": host, "digests": digests, "meta": dict(meta), "best": best}
        self._thread = threading.Thread(target=self._commit, args=(response, job), name=f"checkpoint-{step}")
        self._thread.start()
        if wait:
            self.wait()

    def check(self) -> list[Failure]:
        """All failures so far, the new ones warned about. Does not wait for a running save."""
        for failure in self.failures[self._reported :]:
            self._reported += 1
            if self.silent:
                continue
            count = sum(f.stage == "save" for f in self.failures)
            self.warn(
                f"checkpoint {failure.step}: {failure.stage} failed ({count} failed saves so far): {failure.error}"
            )
        return list(self.failures)

    @property
    def last_save_failed(self) -> bool:
        """Whether the last save is over and did not become a step. True does not wait for a running one."""
        return self._last_failed

    def wait(self) -> list[Failure]:
        """Waits for the running save; then as `check`."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        return self.check()

    def close(self) -> list[Failure]:
        return self.wait()

    def reached(self, point: str):
        """Called at `snapshot`, `written`, `manifest`, `read back`, `renamed`, `best`, `stored`, `deleting`: tests stop
        here."""

    @property
    def _joined(self) -> bool:
        """Whether several processes write one folder together."""
        return jax.process_count() > 1 and self.remote is None

    @property
    def _apart(self) -> bool:
        """Whether there are several processes, each with a folder of its own."""
        return jax.process_count() > 1 and self.remote is not None

    def _commit(self, response, job):
        step, staging = job["step"], self._staging(job["step"])
        try:
            response.result()
            self.reached("written")
            if jax.process_index() != 0:
                return
            tree = {
                item: {name: _describe(x, job["digests"].get((item, name))) for name, x in leaves.items()}
                for item, leaves in job["host"].items()
            }
            files = manifests.describe_files(staging)
            manifest = manifests.build(step, meta=job["meta"] | {"best": bool(job["best"])}, tree=tree, files=files)
            manifests.write(staging, manifest)
            self.reached("manifest")
            if not self._joined:  # Orbax reads behind a barrier: not from one process, nor from a thread
                load(staging, manifest, list(tree), alone=self._apart)
            self.reached("read back")
            self._publish(step, staging)
            if job["best"]:
                write_atomically(self.directory / "best.json", json.dumps({"step": step}))
                self.reached("best")
            if self.remote is not None:
                self.remote.push_step(step)
                self.reached("stored")
        except BaseException as error:
            self._failed(step, "save", error)
            return
        try:
            self._retain(step)
            if self.remote is not None:
                self.remote.keep_steps(self.steps())
        except Exception as error:
            self._failed(step, "retention", error)

    def _publish(self, step, staging):
        final = self.directory / str(step)
        if final.exists():  # a damaged step that the run has come back to, or one of an abandoned future
            shutil.rmtree(self.directory / f"old-{step}", ignore_errors=True)
            os.rename(final, self.directory / f"old-{step}")
        os.rename(staging, final)
        sync_folder(self.directory)
        self._verified.add(step)
        self.reached("renamed")
        shutil.rmtree(self.directory / f"old-{step}", ignore_errors=True)

    def _retain(self, saved: int):
        """Deletes what is older than the newest `keep` valid steps; never `saved`, the best, or anything newer."""
        kept = {saved}
        for step in sorted(self.steps(), reverse=True):
            if len(kept) < self.keep and (step in self._verified or self.valid(step)[0]):
                kept.add(step)
        kept.add(self.best())
        for step in self.steps():
            if step < saved and step not in kept:
                self.reached("deleting")
                doomed = self.directory / f"deleting-{step}"
                os.rename(self.directory / str(step), doomed)  # at once: half a step is never seen under its name
                self._verified.discard(step)
                shutil.rmtree(doomed)

    def _staging(self, step):
        return self.directory / f"saving-{step}"

    def _failed(self, step, stage, error):
        text, number = _first_cause(error)
        self.failures.append(Failure(int(step), stage, text, number in disk.PASSING))
        self._last_failed |= stage == "save"  # after the reason is there: the loop looks from another thread
        try:
            self._sweep()
        except OSError as more:
            self.failures.append(Failure(int(step), "sweep", str(more)))

    def _sweep(self):
        """Removes what a killed or failed save left behind. Only the writer may do that."""
        if jax.process_index() == 0:
            self._recover()
            for pattern in ("saving-*", "deleting-*", "old-*", ".*.tmp"):
                for path in self.directory.glob(pattern):
                    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def _recover(self):
        """A kill between the two renames of `_publish` leaves the step under its old name only."""
        for path in self.directory.glob("old-*"):
            final = self.directory / path.name.removeprefix("old-")
            if not final.exists():
                os.rename(path, final)

    # Reading

    def steps(self) -> list[int]:
        """All step numbers present, valid or not, in ascending order."""
        return steps_lib.list_steps(self.directory)

    def valid(self, step: int) -> tuple[bool, str]:
        """Whether a step's manifest and files are as written, and if not, what is wrong. Reads all of its files."""
        wrong = steps_lib.problem(self.directory, step)
        if wrong:
            return False, wrong
        self._verified.add(step)
        return True, ""

    def newest_valid(self) -> int | None:
        """The step to resume from; None if there is none at all. Each newer step that is skipped is warned about.

        Raises InputError if there are steps and none of them is valid: a run never starts over silently.
        """
        self.wait()
        if jax.process_index() == 0 and self.writer and self.directory.is_dir():
            self._recover()
        skipped, found = [], None
        for step in reversed(self.steps()):
            valid, reason = self.valid(step)
            if valid:
                found = step
                if skipped:
                    self.warn(f"checkpoint {step} is used instead")
                break
            skipped.append(f"step {step}: {reason}")
            self.warn(f"checkpoint {step} is skipped: {reason}")
        code = -2 if skipped and found is None else -1 if found is None else found
        if jax.process_count() > 1:  # one decision for all, whatever each of them saw
            code = int(multihost_utils.broadcast_one_to_all(np.int32(code)))
        if code == -2:
            raise InputError(
                str(self.directory),
                got="only damaged checkpoints (" + "; ".join(skipped) + ")",
                expected="at least one valid step",
                fix="Restore the folder from a copy, or delete it to start over.",
            )
        return None if code == -1 else code

    def best(self) -> int | None:
        """The step marked as best, if it is there; what is wrong with `best.json` is warned about once."""
        step, wrong = steps_lib.read_best(self.directory)
        if wrong and wrong != self._told_best:
            self._told_best = wrong
            self.warn(wrong if step is not None else f"{wrong}: no step counts as the best one")
        return step

    def restore(self, step: int, template: dict) -> dict:
        """The items named in `template`, each in the structure of its template, checked before any device copy.

        Args:
          step: one of `steps()`.
          template: name -> pytree whose leaves say shape, dtype and where to put the values: a
            `jax.ShapeDtypeStruct` with sharding or a jax array (a jax array there), a `jax.ShapeDtypeStruct` without
            (the default device), a numpy array (numpy) or a number (a number). Items of the step that are not named
            are left alone.

        Raises InputError that names the file or the leaf: damage, a missing or unknown leaf, another shape or dtype.
        """
        folder = self.directory / str(step)
        manifest = read_manifest(folder)
        for item, tree in template.items():
            if item not in manifest["tree"]:
                raise InputError(
                    str(folder), got=f"no item {item!r}", expected=f"one of {sorted(manifest['tree'])}",
                    fix="A run that no training made has no optimizer state: start anew from it, in another workdir, "
                    "with train.init_from." if item == "opt" else "",
                )  # fmt: skip
            _match(f"{folder}: {item}", manifest["tree"][item], names(tree))
        if step not in self._verified:
            valid, reason = self.valid(step)
            if not valid:
                raise InputError(str(folder), got=reason, expected="files as they were written", fix=manifests.DAMAGED)
        loaded = load(folder, manifest, list(template), alone=self._apart)
        return {item: jax.tree.map(_as_leaf, tree, from_plain(loaded[item], tree)) for item, tree in template.items()}


def _match(where, saved, wanted):
    same_names(saved, wanted, where=where)
    for name, leaf in wanted.items():
        shape, dtype = shape_dtype(f"{where}/{name}", leaf)
        was = (tuple(saved[name]["shape"]), saved[name]["dtype"])
        if was != (shape, str(dtype)):
            raise InputError(f"{where}/{name}", got=f"{was[1]}{list(was[0])}", expected=f"{dtype}{list(shape)}")


def load(folder, manifest, items, *, alone: bool = False) -> dict:
    """The items as plain trees of numpy arrays, every leaf's digest checked; `alone`: by this process of several."""
    try:
        abstract = {
            item: nest(
                {k: _stub(leaf) for k, leaf in manifest["tree"][item].items()} or {PLACEHOLDER: np.zeros((), np.int8)}
            )
            for item in items
        }
        with _context(alone=alone):
            loaded = ocp.load_checkpointables(folder, abstract)
    except Exception as error:
        raise InputError(str(folder), got=_first_cause(error)[0], expected=f"readable items {items}") from None
    result = {}
    for item in items:
        leaves = {k: np.asarray(x) for k, x in names(loaded[item]).items()} if manifest["tree"][item] else {}
        for name, leaf in manifest["tree"][item].items():
            found = leaves[name]
            if _describe(found) != leaf:
                where = f"{folder}: leaf {item}/{name}"
                raise InputError(where, got=f"{_describe(found)}", expected=f"{leaf}", fix=manifests.DAMAGED)
        result[item] = nest(leaves)
    return result


def _first_cause(error) -> tuple[str, int | None]:
    """Orbax wraps what went wrong in a page about its handlers: the line that says it, and its errno."""
    while not isinstance(error, Unanswered) and (error.__cause__ or error.__context__):
        error = error.__cause__ or error.__context__
    if isinstance(error, Unanswered):
        return f"{error.filename}: {error.strerror}", error.errno
    text = " ".join(str(error).split())
    code = re.search(r"\[os_error_code='(\d+)'\]", text)  # tensorstore's, after a page of JSON
    if code:
        file = re.search(r'local file "([^"]*)"', text)
        where = f": {file[1]}" if file else ""
        return f"{os.strerror(int(code[1]))}{where}", int(code[1])
    return f"{type(error).__name__}: {text[:400]}", getattr(error, "errno", None)


def _describe(x, known=None) -> dict:
    return {"shape": list(x.shape), "dtype": str(x.dtype), "digest": known or digest(x)}


def _stub(leaf):
    return np.broadcast_to(np.zeros((), jnp.dtype(leaf["dtype"])), leaf["shape"])  # no memory behind it


def _as_leaf(leaf, value):
    """A numpy array as what the template's leaf is."""
    if isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
        if leaf.sharding is not None:
            return jax.make_array_from_callback(value.shape, leaf.sharding, lambda index: value[index])
        return jnp.asarray(value) if jax.dtypes.canonicalize_dtype(value.dtype) == value.dtype else value
    return value if isinstance(leaf, (np.ndarray, np.generic)) else value.item()


def _context(*, alone: bool = False):
    context = ocp.Context()
    if alone:  # no barrier: the others do something else
        context.multiprocessing.primary_host = jax.process_index()
        context.multiprocessing.active_processes = {jax.process_index()}
    context.array.saving.use_ocdbt = False
    context.array.saving.use_compression = False  # saves 7 % on float32 weights
    # Orbax's writers wait 300 s for folders that the disk did not let it make, and keep the process that long. Made
    # here, in 2 ms, the error comes before there are any.
    context.async_options.create_directories_asynchronously = False
    return context
