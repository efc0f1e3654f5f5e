"""Tokenised tasks on disk: `$MOLORA_CACHE/data/<key>.npz`, else `~/.cache/molora_jax/data/<key>.npz`.

The key covers everything that the arrays depend on, so an entry is never updated. A file is written beside its place
and renamed, so a reader sees a whole file or none; it ends with the digest of all before, which is checked on reading,
and a file that fails in any way is made again. No pickle is read or written. A folder that cannot be written costs
speed only.
"""

import hashlib
import io
import json
import logging
import os
import pathlib
import tempfile

import numpy as np

DIGEST = 32  # bytes of a SHA-256
log = logging.getLogger(__name__)


def folder() -> pathlib.Path:
    root = os.environ.get("MOLORA_CACHE") or pathlib.Path.home() / ".cache" / "molora_jax"
    return pathlib.Path(root).expanduser() / "data"


def load(key: str) -> dict[str, np.ndarray] | None:
    """The arrays saved under `key`, or None if there are none or they are damaged."""
    path = folder() / f"{key}.npz"
    try:
        raw = path.read_bytes()
        if raw[-DIGEST:] != hashlib.sha256(raw[:-DIGEST]).digest():
            raise ValueError("its digest does not hold")
        with np.load(io.BytesIO(raw[:-DIGEST]), allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        return None
    except Exception as error:  # a damaged zip raises half a dozen types
        log.warning("%s is damaged (%s): building it again", path, error)
        return None


def save(key: str, arrays: dict[str, np.ndarray]) -> None:
    """Writes the arrays under `key`; on failure only a warning."""
    temporary = None
    try:
        folder().mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder(), prefix=".", suffix=".tmp", delete=False) as file:
            temporary = file.name
            whole = io.BytesIO()
            np.savez(whole, **arrays)
            file.write(whole.getbuffer())
            file.write(hashlib.sha256(whole.getbuffer()).digest())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, folder() / f"{key}.npz")
    except OSError as error:
        log.warning("the tokenised data cannot be cached in %s: %s", folder(), error)
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)


def pack_json(value) -> np.ndarray:
    return np.frombuffer(json.dumps(value, ensure_ascii=False).encode(), np.uint8)


def unpack_json(array: np.ndarray):
    return json.loads(array.tobytes())
