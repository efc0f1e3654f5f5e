"""A GGUF reader: metadata and tensors of one file or of its parts, by mmap.

Layout (little-endian): `GGUF`, version u32 (2 or 3), number of tensors u64, number of metadata pairs u64; the pairs
(key, type, value); the tensor entries (name, rank u32, dimensions u64 fastest first, type u32, offset u64); padding to
`general.alignment`; the data. A string is its length u64 and its bytes.

A model in parts is files `NAME-00001-of-00003.gguf`, each a whole GGUF with its own tensors; `split.no`, `split.count`
and `split.tensors.count` say how they belong together, and the first has all other metadata.

No declared size is believed: every count and offset is checked against the bytes the file really has before anything
of that size is made. Source of the format: ggml's `docs/gguf.md`.
"""

import dataclasses
import itertools
import math
import mmap
import pathlib
import re
import struct

import numpy as np

from molora_jax.errors import InputError
from molora_jax.io import quants
from molora_jax.io.files import plain

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_FIX = "Fetch the file again, or convert the model with a current llama.cpp."
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


@dataclasses.dataclass(frozen=True)
class Gguf:
    """An open file. `metadata`: key -> number, bool, str, list or array. `entries`: name -> (shape, type id, bytes)."""

    path: str
    metadata: dict
    entries: dict

    def get(self, key: str, kinds, default=None):
        """A metadata value of one of `kinds`.

        Raises:
          InputError: one of another type, or none where there is no default.
        """
        value = self.metadata.get(key, default)
        if isinstance(value, bool) != (kinds is bool) or not isinstance(value, kinds):
            names = " or ".join(kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
            raise InputError(f"{self.path}: {key}", got=f"{value!r:.100}", expected=f"metadata of type {names}")
        return value

    def get_if_there(self, key: str, kinds):
        """`get`, or None where there is none."""
        return self.get(key, kinds) if key in self.metadata else None

    def numbers(self, key: str, *, whole: bool) -> np.ndarray:
        """A metadata array of numbers, `whole` ones or any. Raises InputError as `get` does."""
        value = self.get(key, np.ndarray)
        if value.dtype.kind not in ("iu" if whole else "iuf"):
            raise InputError(
                f"{self.path}: {key}", got=f"an array of {value.dtype}", expected="integers" if whole else "numbers"
            )
        return value

    def tensor(self, name: str):
        """float32, shape slowest first (`[D_out, D_in]` for a linear layer)."""
        shape, type_id, data = self.entries[name]
        return quants.dequantize(data, type_id).reshape(shape)


class _Cursor:
    """Reads forward through a buffer and refuses to leave it."""

    def __init__(self, path, buffer):
        self.path, self.buffer, self.at = path, buffer, 0

    def fail(self, got, expected):
        raise InputError(f"{self.path}, byte {self.at}", got=got, expected=expected, fix=_FIX)

    def take(self, size, what):
        left = len(self.buffer) - self.at
        if size > left:
            self.fail(f"{left} bytes before the end of the file", f"{size} bytes of {what}")
        self.at += size
        return self.at - size

    def number(self, code, what="a number"):
        return struct.unpack_from("<" + code, self.buffer, self.take(struct.calcsize("<" + code), what))[0]

    def string(self):
        size = self.number("Q", "a string's length")
        start = self.take(size, "a string")
        try:
            return self.buffer[start : start + size].decode("utf-8")
        except UnicodeDecodeError:
            self.fail("bytes that are no UTF-8", "a string")

    def value(self, kind):
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            self.fail(f"metadata type {kind}", "a type from 0 to 12")
        item, count = self.number("I"), self.number("Q")
        if item == _STRING:
            if count > (len(self.buffer) - self.at) // 8:  # a string takes at least 8 bytes
                self.fail(f"an array of {count} strings", "one that fits into the file")
            return [self.string() for _ in range(count)]
        if item not in _SCALARS:
            self.fail(f"an array of metadata type {item}", "numbers or strings")
        dtype = np.dtype(_SCALARS[item]).newbyteorder("<")
        start = self.take(count * dtype.itemsize, "an array")
        return np.frombuffer(self.buffer, dtype, count, start)


def check_magic(path: str | pathlib.Path) -> None:
    """Raises InputError where the file cannot be read or does not start as GGUF does."""
    try:
        with open(plain(path), "rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise InputError(str(path), got=error.strerror or str(error), expected="a readable GGUF file") from None
    if magic != b"GGUF":
        raise InputError(str(path), got=f"a file that starts with {magic!r}", expected="a GGUF file (b'GGUF')")


def files(path: str | pathlib.Path) -> list[pathlib.Path]:
    """The file, or all parts of a model whose first or other part it is, by their names.

    Raises:
      InputError: a part that is missing or no GGUF file.
    """
    path = pathlib.Path(path)
    part = _PART.fullmatch(path.name)
    count = int(part[3]) if part else 1
    if count < 2:
        check_magic(path)
        return [path]
    parts = [path.with_name(f"{part[1]}-{i + 1:05d}-of-{count:05d}.gguf") for i in range(count)]
    for i, file in enumerate(parts):
        try:
            check_magic(file)
        except InputError as error:
            raise InputError(
                f"{file}: part {i + 1} of {count}", got=error.got, expected="all parts in one folder",
                fix="Fetch the missing parts of this split GGUF.",
            ) from None  # fmt: skip
    return parts


def read(path: str | pathlib.Path) -> Gguf:
    """Opens a GGUF file, with the other parts where it is one of several.

    Raises:
      InputError: not a GGUF file, truncated, an unknown tensor type, sizes that do not fit the file, parts that do not
        belong together.
    """
    parts = [_read_one(str(file)) for file in files(path)]
    whole, entries = parts[0], {}
    for i, part in enumerate(parts):
        said = tuple(part.metadata.get(f"split.{key}", default) for key, default in (("no", 0), ("count", 1)))
        if any(type(n) is not int for n in said) or (max(said[1], 1), said[0]) != (len(parts), i):
            raise InputError(
                f"{part.path}: split.count", got=f"part {said[0]!r:.20} (from 0) of {said[1]!r:.20} in its metadata",
                expected=f"part {i} of {len(parts)}, as the file's name says",
                fix="Keep the names NAME-00001-of-0000N.gguf of a model in parts, and all parts of one model together.",
            )  # fmt: skip
        twice = sorted(entries.keys() & part.entries.keys())
        if twice:
            raise InputError(
                f"{part.path}: tensor {twice[0]}", got="a second copy", expected="one part for each", fix=_FIX
            )
        entries |= part.entries
    total = whole.metadata.get("split.tensors.count", len(entries))
    if len(parts) > 1 and total != len(entries):
        raise InputError(
            f"{whole.path}: split.tensors.count", got=f"{len(entries)} tensors in {len(parts)} parts",
            expected=f"{total!r:.20}", fix="Fetch all parts of one model again.",
        )  # fmt: skip
    return Gguf(whole.path, whole.metadata, entries)


def _read_one(path: str) -> Gguf:
    with open(path, "rb") as file:
        buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    cursor = _Cursor(path, buffer)
    cursor.take(4, "magic")
    version = cursor.number("I")
    if version not in (2, 3):
        cursor.fail(f"GGUF version {version}", "version 2 or 3, little-endian")
    num_tensors, num_pairs = cursor.number("Q"), cursor.number("Q")
    metadata = {}
    for _ in range(num_pairs):
        key = cursor.string()
        if key in metadata:
            cursor.fail(f"the metadata key {key[:80]!r} a second time", "every key once")
        metadata[key] = cursor.value(cursor.number("I"))
    headers = [_tensor_header(cursor) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20:
        cursor.fail(f"general.alignment {alignment!r:.80}", "a small positive integer")
    start = -(-cursor.at // alignment) * alignment
    data = np.frombuffer(buffer, np.uint8)
    entries, total = {}, 0
    for name, shape, type_id, offset, size in headers:
        if start + offset + size > len(data):
            raise InputError(
                f"{path}: tensor {name}", got=f"a file of {len(data)} bytes",
                expected=f"at least {start + offset + size} (the file is cut short or its offsets are wrong)", fix=_FIX,
            )  # fmt: skip
        if name in entries:
            raise InputError(f"{path}: tensor {name}", got="two entries", expected="one", fix=_FIX)
        total += size
        if total > len(data):  # tensors that share bytes: a small file that grows when it is converted
            cursor.fail(f"tensors of {total} bytes together", f"at most the file's {len(data)}")
        entries[name] = (shape, type_id, data[start + offset : start + offset + size])
    ranges = sorted((offset, offset + size, name) for name, _, _, offset, size in headers)
    for (_, end, name), (begin, _, other) in itertools.pairwise(ranges):
        if begin < end:
            raise InputError(f"{path}: tensor {other}", got=f"bytes of tensor {name}", expected="its own", fix=_FIX)
    return Gguf(path, metadata, entries)


def _tensor_header(cursor):
    name, rank = cursor.string(), cursor.number("I")
    if not 1 <= rank <= 4:
        cursor.fail(f"tensor {name} of rank {rank}", "rank 1 to 4")
    shape = tuple(cursor.number("Q") for _ in range(rank))[::-1]
    type_id, offset = cursor.number("I"), cursor.number("Q")
    if type_id not in quants.TYPES:
        names = ", ".join(entry[0] for entry in quants.TYPES.values())
        raise InputError(
            f"{cursor.path}: tensor {name}", got=f"GGML type {type_id}", expected=f"one of {names}",
            fix="Take another quantisation of this model (Q8_0 or Q4_K_M are common).",
        )  # fmt: skip
    _, block, block_bytes, _ = quants.TYPES[type_id]
    if shape[-1] % block or min(shape) < 1:
        cursor.fail(f"tensor {name} of shape {shape}", f"positive sizes, the last a multiple of {block}")
    return name, shape, type_id, offset, math.prod(shape) // block * block_bytes
