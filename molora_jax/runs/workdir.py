"""The folder of a run: one writer at a time, one identity for life.

    DIR/lock            held (flock) while a process writes here; the kernel frees it when that process dies
    DIR/identity.json   what the run is (`identity.py`); a start as another run is refused, by the manifest
                        of the newest valid step too
    DIR/config.json     the whole config of the latest start
    DIR/checkpoints/, DIR/metrics.jsonl, DIR/tensorboard/

Nothing here imports jax: a wrong start is refused within a second.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import socket

from molora_jax import stores
from molora_jax.errors import InputError
from molora_jax.io import disk
from molora_jax.io.files import sweep, write_atomically
from molora_jax.runs import identity as identity_lib
from molora_jax.runs.folders import is_group, runs_in
from molora_jax.runs.identity import differences, identity
from molora_jax.runs.manifest import json_hash
from molora_jax.runs.remote import Remote
from molora_jax.runs.steps import list_steps

__all__ = ["Workdir", "differences", "identity"]


def at_hand(path, *, writer: bool = True) -> pathlib.Path:
    """The folder in which a run works: the workdir, of a URL one of this machine (another for each that only reads)."""
    if stores.is_url(path):
        return stores.place(stores.served("workdir", path), "run" if writer else f"run-{os.getpid()}")
    return pathlib.Path(path).expanduser().absolute()


class Workdir:
    """Makes the folder and takes its lock. Raises InputError, naming the holder, while another writer has it.

    On several processes only process 0 is the `writer`; the others take no lock and write nothing.

    Of a URL (`gs://`, `s3://`) the folder is one of this machine, and `remote` what keeps the store as it is
    (`remote.py`); the other processes have a copy each.
    """

    def __init__(self, path, *, writer: bool = True, note=lambda text: None):
        self.url, self.path = path if stores.is_url(path) else None, at_hand(path, writer=writer)
        self.writer, self.remote = writer, None
        self._lock, self._inode = None, None
        self.identity = None  # the dict, once it is checked
        if not writer:
            if self.url is not None:
                self.remote = Remote(self.url, self.path, writer=False)
            return
        if not str(path).strip():
            raise InputError("workdir", got="an empty path", expected="a folder for the run", fix="Name one.")
        if is_group(self.path):
            fix = "Go on with all of them by --runs, with one by its own folder, or choose another workdir."
            got = f"{self.path}, the folder of a group of runs ({', '.join(runs_in(self.path))})"
            raise InputError("workdir", got=got, expected="a folder of its own", fix=fix)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        except (FileExistsError, NotADirectoryError):
            raise InputError("workdir", got=f"{self.path}, a file", expected="a folder") from None
        except OSError as error:
            raise InputError(
                "workdir", got=f"{self.path}: {error.strerror}", expected="a folder that can be written",
                fix="Choose another workdir.",
            ) from None  # fmt: skip
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._lock, 200, 0).decode(errors="replace").strip() or "another process"
            self.close()
            raise InputError(
                "workdir",
                got=f"{self.path}, in use by {holder}",
                expected="a folder that no other run writes to",
                fix="Stop that run, or choose another workdir.",
            ) from None
        except OSError as error:  # a file system without locks
            self.close()
            raise InputError(
                "workdir", got=f"{self.path}: no lock ({error.strerror})", expected="a file system with locks (flock)",
                fix="Choose another workdir.",
            ) from None  # fmt: skip
        with contextlib.suppress(OSError):  # a full disk: the lock holds without the name of its holder
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        here = os.stat(self.path)
        self._inode = here.st_dev, here.st_ino
        if self.url is not None:
            try:
                self.remote = Remote(self.url, self.path, writer=True, note=note)
            except BaseException:
                self._unlock()
                raise
        sweep(self.path)  # what a killed start left, now that no other one writes
        sweep(self.path / "report", older=3600.0)  # an evaluation takes no lock
        # A forked data worker that outlives us must not keep the lock. Closing its copy does not unlock ours.
        os.register_at_fork(after_in_child=self._unlock)

    def __str__(self):
        return self.url or str(self.path)

    def __fspath__(self):
        return str(self.path)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Gives the lock back. The file stays: deleting it would let two writers lock two files of one name."""
        if self.remote is not None:
            self.remote.close()
            if not self.writer:
                stores.forget(self.url, self.path.parent.parent.name)
        self._unlock()

    def _unlock(self):
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def check_there(self):
        """Raises InputError where the folder was removed, moved or put in another's place since this start, or the
        lease of a store is another process's."""
        if self.remote is not None:
            self.remote.check()
        try:
            now = os.stat(self.path)
            gone = (now.st_dev, now.st_ino) != self._inode
            # `rm -r` under a running writer leaves what was written in that moment, and the folder with it
            gone |= not any((self.path / name).exists() for name in ("lock", "config.json"))
        except (FileNotFoundError, NotADirectoryError):
            gone = True
        except OSError:
            gone = False  # a file system that does not answer just now
        if self.writer and gone:
            raise InputError(
                "workdir", got=f"{self.path}, removed or moved while the run was writing to it",
                expected="the folder that the run began in",
                fix="Put it back and start the same command again; without it the run begins anew.",
            )  # fmt: skip

    def followed(self, config, note):
        """The config with what the run that is here has settled for good, and what a config file may not say.

        A file's rows with several task names were one task in older versions: a run that began so goes on so.
        """
        path = self.path / "config.json"
        if not path.is_file() or not self.started:
            return config
        try:
            told = json.loads(path.read_text(encoding="utf-8"))["data"].get("file_tasks", False)
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return config  # damaged: the identity says whether the data are the same
        if isinstance(told, bool) and told != config.data.get("file_tasks", True):
            config = config.copy_and_resolve_references()
            with config.unlocked():
                config.data.file_tasks = told
            note(f"data.file_tasks is {told} in this run, and stays so")
        return config

    def write_config(self, config: dict):
        """`config.json`, replaced as a whole."""
        if self.writer:
            text = json.dumps(config, indent=1, sort_keys=True) + "\n"
            disk.patiently(lambda: write_atomically(self.path / "config.json", text))

    @property
    def started(self) -> bool:
        """Whether an earlier start saved a step here: only then does the folder belong to a run."""
        return bool(list_steps(self.path / "checkpoints"))

    def recorded(self, manifest: dict | None = None) -> dict | None:
        """The identity of the run that is here; None where no start saved anything, or all record of it is gone."""
        if not self.started:
            return None
        old = identity_lib.read(self.path / "identity.json")
        return old if old is not None or manifest is None else identity_lib.of_step(manifest)

    def refuse_another(self, config: dict, extra: dict):
        """Raises InputError where `identity.json` is that of another run; writes nothing."""
        old = identity_lib.read(self.path / "identity.json") if self.writer and self.started else None
        changed, _ = identity_lib.compare(old, identity(config, extra)) if old else ([], [])
        if changed:
            raise identity_lib.another_run(f"workdir {self.path}", changed)

    def check_identity(self, config: dict, extra: dict, *, manifest: dict | None = None, note=None) -> str:
        """The hash of this run's identity, which the first start records here.

        Args:
          config, extra: as of `identity`.
          manifest: of the step to go on from. note: called with a line of text where something new is recorded.

        Raises InputError that lists each field in which an earlier start was another run. A start that ended before it
        saved anything (it was refused, say) claims nothing: the next one may differ.
        """
        new, path = identity(config, extra), self.path / "identity.json"
        self.identity, old = new, identity_lib.read(path) if self.writer and self.started else None
        if manifest is not None and self.writer:
            if old is not None:
                identity_lib.check_record(old, manifest, where=str(path))
            else:
                old = manifest.get("run")
                (note or (lambda text: None))(f"{path} was missing: step {manifest['step']} says what the run is")
            identity_lib.check_step(manifest, new, where=f"workdir {self.path}")
        if old is None:
            if self.writer:
                self._record(path, new)
            return json_hash(new)
        changed, added = identity_lib.compare(old, new)
        if changed:
            raise identity_lib.another_run(f"workdir {self.path}", changed)
        whole = identity_lib.extended(old, new, added)
        if added and note is not None:
            names = dict.fromkeys(".".join(name.split(".")[:2]) for name in added)
            note(f"identity.json is of an older version, without {', '.join(names)}: recorded now, checked from now on")
        if whole != old or not path.exists():
            self._record(path, whole)
        self.identity = {name: value for name, value in whole.items() if name != identity_lib.ADDED}
        return json_hash(self.identity)

    def _record(self, path, value):
        text = json.dumps(value, indent=1, sort_keys=True) + "\n"
        disk.patiently(lambda: write_atomically(path, text))
