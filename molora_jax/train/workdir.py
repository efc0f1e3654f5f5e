"""The folder of a run: one writer at a time, one identity for life.

    DIR/lock            held (flock) while a process writes here; the kernel frees it when that process dies
    DIR/identity.json   what the run is; a start as another run is refused
    DIR/config.json     the whole config of the latest start
    DIR/checkpoints/, DIR/metrics.jsonl, DIR/tensorboard/

Nothing here imports jax: a wrong start is refused within a second.
"""

import fcntl
import json
import os
import pathlib
import socket

from molora_jax.config_fields import FIELDS
from molora_jax.errors import InputError
from molora_jax.io.manifest import json_hash, write_atomically

SECTIONS = ("method", "losses", "optim", "schedule", "seed")
TRAIN_FIELDS = ("batch_size", "accumulate", "clip", "init_from")
# data.tasks and data.valid may hold paths: the fingerprint of their content stands for them; base.source likewise.
CONTENT = {"data": ("tasks", "data_fingerprint"), "base": ("source", "base_digest")}

TOLD = ("valid", "file_tasks")  # the fingerprint tells these as well


def identity(config: dict, extra: dict) -> dict:
    """The part of a config that says which run this is.

    Args:
      config: nested dict with the fields of `configs/common.py`.
      extra: `base_digest` and `data_fingerprint` of the content; more entries are kept under `extra`.

    Mesh, engine, remat, logging, intervals, `stop_after` and evaluation are left out. `train.steps` is left out where
    the learning rate does not depend on it (`optim.decay="constant"`).
    """
    result = {name: config[name] for name in SECTIONS if name in config}
    for section, (source, content) in CONTENT.items():
        fields = {key: value for key, value in config.get(section, {}).items() if key not in (source, *TOLD)}
        # A field at the value that its absence means is left out: a run from before it existed is the same run.
        fields = {k: v for k, v in fields.items() if k not in FIELDS[section] or v != FIELDS[section][k].default}
        result[section] = fields | {content.split("_")[1]: extra[content]}
    result["train"] = {name: config["train"][name] for name in TRAIN_FIELDS if name in config["train"]}
    if config["train"].get("exact"):  # named only where it is on: it was not in runs of older versions
        result["train"]["exact"] = True
    if config.get("optim", {}).get("decay") != "constant":
        result["train"]["steps"] = config["train"].get("steps")
    others = {key: value for key, value in extra.items() if key not in ("base_digest", "data_fingerprint")}
    return json.loads(json.dumps(result | ({"extra": others} if others else {})))


def differences(old: dict, new: dict) -> list[str]:
    """`["optim.learning_rate: was 0.0002, now 0.0003", ...]` in the order of the names."""
    absent = object()
    old, new = _flat(old), _flat(new)

    def show(value):
        return "absent" if value is absent else json.dumps(value)

    lines = []
    for name in sorted(old.keys() | new.keys()):
        was, now = old.get(name, absent), new.get(name, absent)
        if was is absent or now is absent or json.dumps(was) != json.dumps(now):
            reason = " (the learning rate depends on it: optim.decay is not constant)" if name == "train.steps" else ""
            lines.append(f"{name}: was {show(was)}, now {show(now)}{reason}")
    return lines


class Workdir:
    """Makes the folder and takes its lock. Raises InputError, naming the holder, while another writer has it.

    On several processes only process 0 is the `writer`; the others take no lock and write nothing.
    """

    def __init__(self, path, *, writer: bool = True):
        self.path, self.writer = pathlib.Path(path).absolute(), writer
        self._lock = None
        if not writer:
            return
        if not str(path).strip():
            raise InputError("workdir", got="an empty path", expected="a folder for the run", fix="Name one.")
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
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        # A forked data worker that outlives us must not keep the lock. Closing its copy does not unlock ours.
        os.register_at_fork(after_in_child=self.close)

    def __fspath__(self):
        return str(self.path)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Gives the lock back. The file stays: deleting it would let two writers lock two files of one name."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def followed(self, config, note):
        """The config with what the run that is here has settled for good, and what a config file may not say.

        A file's rows with several task names were one task in older versions: a run that began so goes on so.
        """
        path = self.path / "config.json"
        if not path.is_file() or not any((self.path / "checkpoints").glob("[0-9]*")):
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
            write_atomically(self.path / "config.json", json.dumps(config, indent=1, sort_keys=True) + "\n")

    def check_identity(self, config: dict, extra: dict) -> str:
        """The hash of this run's identity, which the first start records here.

        Raises InputError that lists each field in which an earlier start was another run. A start that ended before it
        saved anything (it was refused, say) claims nothing: the next one may differ.
        """
        new = identity(config, extra)
        path = self.path / "identity.json"
        if self.writer and path.exists() and any((self.path / "checkpoints").glob("[0-9]*")):
            try:
                old = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise InputError(
                    str(path),
                    got=f"{error}",
                    expected="the identity as it was written",
                    fix="Restore the file, or choose another workdir.",
                ) from None
            changed = differences(old, new)
            if changed:
                raise InputError(
                    f"workdir {self.path}",
                    got="another run than the one that is there:\n  " + "\n  ".join(changed) + "\n",
                    expected="the same values",
                    fix="Undo these changes, or choose another workdir (base.digest is the content of base.source, "
                    "data.fingerprint that of data.tasks).",
                )
        elif self.writer:
            write_atomically(path, json.dumps(new, indent=1, sort_keys=True) + "\n")
        return json_hash(new)


def _flat(value, prefix=""):
    if not isinstance(value, dict):
        return {prefix: value}
    return {name: leaf for key in value for name, leaf in _flat(value[key], f"{prefix}.{key}".lstrip(".")).items()}
