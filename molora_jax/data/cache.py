"""Tokenised tasks on disk: `$MOLORA_CACHE/data/<key>.npz`, else `~/.cache/molora_jax/data/<key>.npz`.

The key covers everything that the arrays depend on, so an entry is never updated. A file is written beside its place
and renamed, so a reader sees a whole file or none; it ends with a digest of its key and of all before it, and a file
where that does not hold, or is another entry's, is made again. Once its digest is seen to hold it is mapped: a page is
read when it is used, and several processes of a machine have it once. No pickle is read or written. A folder that
cannot be written costs speed only. Users may share one: files are readable as the umask says, and what another user's
file does not let us read is a miss.
"""

import hashlib
import io
import json
import logging
import os
import pathlib
import zipfile

import numpy as np

from molora_jax.io.files import replacing, sweep

DIGEST = 32  # bytes of a SHA-256
CHUNK = 1 << 22  # bytes hashed at a time
log = logging.getLogger(__name__)
STALE_SECONDS = 86_400


def folder() -> pathlib.Path:
    root = os.environ.get("MOLORA_CACHE") or pathlib.Path.home() / ".cache" / "molora_jax"
    return pathlib.Path(root).expanduser() / "data"


def place() -> pathlib.Path | None:
    """Where large temporaries go; None, the system's own, where the cache cannot be written."""
    try:
        folder().mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder() if os.access(folder(), os.W_OK) else None


def load(key: str) -> dict[str, np.ndarray] | None:
    """The arrays saved under `key`, or None if there are none or they are damaged."""
    path = folder() / f"{key}.npz"
    try:
        with open(path, "rb") as file:
            total, left = hashlib.sha256(f"{key}\0".encode()), path.stat().st_size - DIGEST
            while left > 0 and (chunk := file.read(min(left, CHUNK))):
                total.update(chunk)
                left -= len(chunk)
            if left or file.read() != total.digest():
                raise ValueError("its digest does not hold")
            return _mapped(path, file)
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
    try:
        folder().mkdir(parents=True, exist_ok=True)
        sweep(folder(), older=STALE_SECONDS)
        with replacing(folder() / f"{key}.npz") as file:
            hashing = _Hashing(file, key)
            np.savez(hashing, **arrays)
            file.write(hashing.total.digest())
    except OSError as error:
        log.warning("the tokenised data cannot be cached in %s: %s", folder(), error)


class _Hashing:
    """A file that is written from its start to its end, with the digest of its key and of what is in it so far."""

    def __init__(self, file, key: str):
        self._file, self.total = file, hashlib.sha256(f"{key}\0".encode())

    def write(self, data) -> int:
        self.total.update(data)
        return self._file.write(data)

    def read(self, *_):  # numpy asks for one to tell a file from a path
        raise io.UnsupportedOperation("read")

    def flush(self):
        self._file.flush()


def _mapped(path, file) -> dict[str, np.ndarray]:
    """The arrays of an uncompressed npz in their places in the file: a page is read when it is used."""
    arrays = {}
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            if info.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{info.filename} is compressed")
            file.seek(info.header_offset + 26)
            name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
            file.seek(info.header_offset + 30 + name + extra)
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(file)
            if dtype.hasobject or fortran and len(shape) > 1:
                raise ValueError(f"{info.filename} is no plain array")
            empty = 0 in shape
            mapped = np.zeros(shape, dtype) if empty else np.memmap(path, dtype, "r", file.tell(), shape)
            arrays[info.filename.removesuffix(".npy")] = mapped
    return arrays


def pack_json(value) -> np.ndarray:
    return np.frombuffer(json.dumps(value, ensure_ascii=False).encode(), np.uint8)


def unpack_json(array: np.ndarray):
    return json.loads(array.tobytes())
