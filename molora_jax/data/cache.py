"""Tokenised tasks on disk: `$MOLORA_CACHE/data/<key>.npz`, else `~/.cache/molora_jax/data/<key>.npz`.

The key covers everything that the arrays depend on, so an entry is never updated. A file is written beside its place
and renamed, so a reader sees a whole file or none; it ends with a digest of its key and of all before it, and a file
where that does not hold, or is another entry's, is made again. No pickle is read or written. A folder that
cannot be written costs speed only. Users may share one: files are readable as the umask says, and what another user's
file does not let us read is a miss.
"""

import contextlib
import hashlib
import io
import json
import logging
import os
import pathlib
import tempfile

import numpy as np

from molora_jax.io.files import sweep

DIGEST = 32  # bytes of a SHA-256
log = logging.getLogger(__name__)
STALE_SECONDS = 86_400


def folder() -> pathlib.Path:
    root = os.environ.get("MOLORA_CACHE") or pathlib.Path.home() / ".cache" / "molora_jax"
    return pathlib.Path(root).expanduser() / "data"


def load(key: str) -> dict[str, np.ndarray] | None:
    """The arrays saved under `key`, or None if there are none or they are damaged."""
    path = folder() / f"{key}.npz"
    try:
        raw = path.read_bytes()
        if raw[-DIGEST:] != _digest(key, memoryview(raw)[:-DIGEST]):
            raise ValueError("its digest does not hold")
        with np.load(io.BytesIO(raw[:-DIGEST]), allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
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
        sweep(folder(), older=STALE_SECONDS)
        with tempfile.NamedTemporaryFile(dir=folder(), prefix=".", suffix=".tmp", delete=False) as file:
            temporary = file.name
            whole = io.BytesIO()
            np.savez(whole, **arrays)
            file.write(whole.getbuffer())
            file.write(_digest(key, whole.getbuffer()))
            os.fchmod(file.fileno(), 0o666 & ~_umask())  # a temporary file's 0600 would lock other users out
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, folder() / f"{key}.npz")
    except OSError as error:
        log.warning("the tokenised data cannot be cached in %s: %s", folder(), error)
        if temporary:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _digest(key: str, content) -> bytes:
    total = hashlib.sha256(f"{key}\0".encode())
    total.update(content)
    return total.digest()


def pack_json(value) -> np.ndarray:
    return np.frombuffer(json.dumps(value, ensure_ascii=False).encode(), np.uint8)


def unpack_json(array: np.ndarray):
    return json.loads(array.tobytes())
