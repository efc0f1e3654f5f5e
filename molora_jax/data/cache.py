"""Tokenised tasks on disk: `$MOLORA_CACHE/data/<key>.npz`, else `~/.cache/molora_jax/data/<key>.npz`.

The key covers everything that the arrays depend on, so an entry is never updated. A file is written beside its place
and renamed, so a reader sees a whole file or none; a digest of the key and of the arrays inside is checked on reading,
and a file that fails in any way, or is another entry's, is made again. No pickle is read or written. A folder that
cannot be written costs speed only. Users may share one: files are readable as the umask says, and what another user's
file does not let us read is a miss.
"""

import contextlib
import hashlib
import json
import logging
import os
import pathlib
import tempfile
import time

import numpy as np

log = logging.getLogger(__name__)
STALE_SECONDS = 86_400


def folder() -> pathlib.Path:
    root = os.environ.get("MOLORA_CACHE") or pathlib.Path.home() / ".cache" / "molora_jax"
    return pathlib.Path(root).expanduser() / "data"


def load(key: str) -> dict[str, np.ndarray] | None:
    """The arrays saved under `key`, or None if there are none or they are damaged."""
    path = folder() / f"{key}.npz"
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        digest = bytes(arrays.pop("digest"))
        if digest != _digest(key, arrays):
            raise ValueError("its digest does not hold")
        return arrays
    except FileNotFoundError:
        return None
    except OSError as error:
        log.warning("%s cannot be read (%s): building it again", path, error.strerror or error)
        return None
    except Exception as error:  # a damaged zip raises half a dozen types
        log.warning("%s is damaged (%s): building it again", path, error)
        return None


def save(key: str, arrays: dict[str, np.ndarray]) -> None:
    """Writes the arrays under `key`; on failure only a warning."""
    temporary = None
    try:
        folder().mkdir(parents=True, exist_ok=True)
        _sweep()
        with tempfile.NamedTemporaryFile(dir=folder(), prefix=".", suffix=".tmp", delete=False) as file:
            temporary = file.name
            np.savez(file, digest=np.frombuffer(_digest(key, arrays), np.uint8), **arrays)
            os.fchmod(file.fileno(), 0o666 & ~_umask())  # a temporary file's 0600 would lock other users out
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, folder() / f"{key}.npz")
    except OSError as error:
        log.warning("the tokenised data cannot be cached in %s: %s", folder(), error)
        if temporary:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def _sweep():
    """Removes what killed processes left, once it is surely nobody's."""
    for path in folder().glob(".*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > STALE_SECONDS:
                path.unlink()


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _digest(key, arrays) -> bytes:
    total = hashlib.sha256(f"{key}\0".encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        total.update(f"{name} {array.dtype.str} {array.shape}\0".encode())
        total.update(memoryview(array).cast("B") if array.size else b"")
    return total.digest()


def pack_json(value) -> np.ndarray:
    return np.frombuffer(json.dumps(value, ensure_ascii=False).encode(), np.uint8)


def unpack_json(array: np.ndarray):
    return json.loads(array.tobytes())
