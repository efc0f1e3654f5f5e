"""safetensors files as numpy views, and a writer that holds one tensor at a time.

Layout: header length u64 (little-endian), a JSON header `{name: {dtype, shape, data_offsets: [begin, end]}}`, the data.
`read` maps the file and returns views, so nothing is copied and no declared size is allocated; the `safetensors`
package would copy each tensor once more. bfloat16 comes from ml_dtypes.

Source of the format: the `safetensors` README (header at most 100 MB, offsets within the file).
"""

import json
import math
import mmap
import os
import pathlib

import ml_dtypes
import numpy as np

from molora_jax.backbones.hf_fields import quoted, shown
from molora_jax.errors import InputError
from molora_jax.io.files import named, plain

DTYPES = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16), "I64": np.dtype(np.int64), "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16), "I8": np.dtype(np.int8), "U8": np.dtype(np.uint8), "BOOL": np.dtype(np.bool_),
}  # fmt: skip
FLOATS = tuple(DTYPES[name] for name in ("F64", "F32", "F16", "BF16"))
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000
_FIX = "Fetch the file again, or delete it if it lies in the cache."


def read(path: str | pathlib.Path) -> dict:
    """Name -> read-only view into the mapped file.

    Raises:
      InputError: truncated, malformed, an unknown dtype, or offsets that do not fit the shapes and the file.
    """
    path = str(path)

    def fail(got, expected, where=path, fix=_FIX):
        raise InputError(where, got=got, expected=expected, fix=fix) from None

    try:
        with open(plain(path), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < 8:
                fail(f"a file of {size} bytes", "a safetensors file")
            buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        got = getattr(error, "strerror", None) or str(error)
        raise InputError(shown(path, 1000), got=got, expected="a readable safetensors file") from None
    length = int.from_bytes(buffer[:8], "little")
    if length > min(_MAX_HEADER, size - 8):
        fail(f"a header of {length} bytes in a file of {size}", "a header that fits (is it a safetensors file?)")
    try:
        header = json.loads(buffer[8 : 8 + length], object_pairs_hook=_once, parse_constant=_constant)
        if not isinstance(header, dict):
            raise ValueError  # noqa: TRY004
    except Repeated as error:
        fail(f"two entries named {shown(error.args[0])}", "one entry for each tensor")
    except (ValueError, RecursionError):
        fail("a header that is no JSON object", "a safetensors file")
    data = np.frombuffer(buffer, np.uint8, offset=8 + length)
    views, ranges = {}, []
    for name, entry in header.items():
        if name == "__metadata__":
            texts = entry is None or (isinstance(entry, dict) and all(isinstance(v, str) for v in entry.values()))
            if not texts:
                fail(shown(entry), "an object of texts", f"{path}: __metadata__")
            continue
        where = f"{path}: tensor {shown(name, 200)}"
        try:
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            numbers = [*shape, begin, end]
        except (TypeError, KeyError, ValueError):
            fail("an entry without dtype, shape and data_offsets", "a safetensors entry", where)
        if not isinstance(dtype, str) or dtype not in DTYPES:
            fail(f"dtype {shown(dtype)!r}", f"one of {', '.join(DTYPES)}", where, "Save the model in bfloat16.")
        if len(shape) > 8 or not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
            fail("sizes that are no natural numbers", "shape and data_offsets of natural numbers", where)
        expected = math.prod(shape) * DTYPES[dtype].itemsize
        if end - begin != expected or end > len(data):
            fail(
                f"bytes {begin}..{end} of {len(data)}",
                f"{expected} bytes inside the file for shape {tuple(shape)} {dtype} (is the file cut short?)", where,
            )  # fmt: skip
        raw = data[begin:end]
        if (8 + length + begin) % DTYPES[dtype].itemsize:
            raw = raw.copy()  # old writers did not align the header
        views[name] = raw.view(DTYPES[dtype]).reshape(shape)
        ranges.append((begin, end, name))
    total = sum(view.nbytes for view in views.values())
    if total > len(data):  # many names for the same bytes: a small file that grows when it is copied
        fail(f"{total} declared bytes", f"at most the {len(data)} that the file has")
    at, last = 0, ""  # the tensors fill the data without a gap (empty ones may lie anywhere)
    for begin, end, name in sorted(r for r in ranges if r[0] < r[1]):
        if begin < at:
            fail(f"bytes of tensor {shown(last)}", "bytes of its own", f"{path}: tensor {shown(name, 200)}")
        if begin > at:
            fail(
                f"{begin - at} bytes of no tensor before it",
                "tensors without a gap",
                f"{path}: tensor {shown(name, 200)}",
            )
        at, last = end, name
    if at != len(data):
        fail(f"{len(data) - at} bytes behind the last tensor", "a file that its tensors fill")
    return views


def let_go(view) -> None:
    """Takes the pages of a mapped file out of this process; they come back where they are read again."""
    while isinstance(view, np.ndarray):
        view = view.base
    view = view.obj if isinstance(view, memoryview) else view
    if isinstance(view, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        view.madvise(mmap.MADV_DONTNEED)


class Repeated(ValueError):
    """A key that a JSON object has twice."""


def _constant(name):
    raise ValueError(f"{name} is not JSON")


def _once(pairs):
    found = dict(pairs)
    if len(found) < len(pairs):
        seen = set()
        raise Repeated(next(key for key, _ in pairs if key in seen or seen.add(key)))
    return found


def read_index(path: pathlib.Path) -> dict[str, str]:
    """Tensor name -> file name of a `model.safetensors.index.json`; every file lies beside the index.

    Raises:
      InputError: no JSON, a tensor named twice, a name that is no file name.
    """
    try:
        index = json.loads(plain(path).read_text(encoding="utf-8-sig"), object_pairs_hook=_once)
    except OSError as error:
        raise InputError(str(path), got=error.strerror or str(error), expected="a readable file") from None
    except Repeated as error:
        raise InputError(str(path), got=f"{shown(error.args[0])} twice", expected="every name once", fix=_FIX) from None
    except (ValueError, RecursionError):
        raise InputError(str(path), got="no JSON", expected="a JSON object with a weight_map", fix=_FIX) from None
    where, names = f"{path}: weight_map", index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()) or not names:
        raise InputError(where, got=shown(names), expected="tensor name -> file name", fix=_FIX)
    for name in set(names.values()):
        inside = name.isprintable() and not set(name) & set("/\\:") and name not in ("", ".", "..")
        if not inside or not name.endswith(".safetensors"):
            raise InputError(where, got=quoted(name), expected="names of .safetensors files inside the folder")
    return names


def write(path: str | pathlib.Path, shapes: dict, dtype, tensors) -> None:
    """Writes `shapes` (name -> shape, all of one dtype) and flushes to disk.

    Args:
      tensors: yields the arrays in the order of `shapes`; each is cast to `dtype`.
    """
    dtype = np.dtype(dtype)

    def cast():
        for shape, tensor in zip(shapes.values(), tensors, strict=True):
            if tensor.shape != tuple(shape):
                raise ValueError(f"a tensor of shape {tensor.shape}, declared as {shape}")
            yield tensor.astype(dtype, copy=False)

    _write(path, {name: (dtype, shape) for name, shape in shapes.items()}, cast())


def write_named(path: str | pathlib.Path, arrays: dict, metadata: dict | None = None) -> None:
    """Writes arrays (name -> array, each of its own dtype), in the order of their names, with texts as metadata."""
    arrays = {name: np.asarray(arrays[name]) for name in sorted(arrays)}
    arrays = dict(sorted(arrays.items(), key=lambda pair: -pair[1].dtype.itemsize))  # so that all are aligned
    _write(path, {name: (x.dtype, x.shape) for name, x in arrays.items()}, arrays.values(), metadata)


def _write(path, declared: dict, arrays, metadata: dict | None = None) -> None:
    """`declared`: name -> (dtype, shape), in the order in which `arrays` yields them."""
    header, at = {"__metadata__": {"format": "pt", **(metadata or {})}}, 0  # transformers insists on a format
    for name, (dtype, shape) in declared.items():
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)  # so that the data is aligned in the mapping
    with named(path), open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in arrays:
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def read_metadata(path: str | pathlib.Path) -> dict[str, str]:
    """The texts of a file that `read` accepts."""
    with open(plain(path), "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return header.get("__metadata__") or {}
