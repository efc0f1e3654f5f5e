"""Seeded mutations of the formats that strangers' files come in: bytes, JSON trees, safetensors and npy headers."""

import io
import json
import pickle
import random
import struct
import zipfile

import numpy as np

DEEP = "[" * 100_000 + "]" * 100_000
VALUES = (
    None, True, False, 0, -1, 1, 7, 2**31, 2**63, -(2**63), 2**200, 1e308, float("nan"), float("inf"), 0.5, "", "a",
    "\0", "\ud800", "../../etc/passwd", "/etc/passwd", "x" * 10_000, "{{ 1/0 }}", [], [[]], [0] * 1000, {}, {"a": {}},
    "NaN", [-1, 2**62], [2**31, 2**31], "F32", "I64", "<|im_end|>", "linear", "yarn", "float32",
)  # fmt: skip


def flip(raw: bytes, rng: random.Random) -> bytes:
    data = bytearray(raw)
    for _ in range(rng.choice((1, 1, 4, 32))):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def splice(raw: bytes, rng: random.Random) -> bytes:
    """Cuts, repeats, inserts, or replaces a stretch."""
    a = rng.randrange(len(raw) + 1)
    b = min(len(raw), a + rng.choice((1, 4, 8, 100, len(raw))))
    middle = rng.choice((b"", raw[a:b] * 2, rng.randbytes(b - a), b"\0" * (b - a), b"\xff" * 8, b"\xed\xa0\x80"))
    return raw[:a] + middle + raw[b:]


def cut(raw: bytes, rng: random.Random) -> bytes:
    return raw[: rng.randrange(len(raw) + 1)]


def other(raw: bytes, rng: random.Random) -> bytes:
    """Something else altogether."""
    return rng.choice(
        (b"", b"\0" * 64, rng.randbytes(200), b"[]", b"3", b"null", b"{}", DEEP.encode(), b'{"a": 1', b"<html>")
    )


def bytes_of(raw: bytes, rng: random.Random) -> bytes:
    return rng.choice((flip, flip, splice, splice, cut, other))(raw, rng)


def tree(value, rng: random.Random):
    """A JSON tree with one to three nodes changed, dropped, doubled or renamed."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 2, 3))):
        place = _place(value, rng)
        if place is None:
            return rng.choice(VALUES)
        holder, key = place
        kind = rng.choice(("set", "set", "set", "drop", "rename", "copy"))
        if kind == "set":
            holder[key] = rng.choice(VALUES)
        elif kind == "copy":
            there, name = _place(value, rng)
            holder[key] = json.loads(json.dumps(there[name]))
        elif isinstance(holder, dict):
            moved = holder.pop(key)
            if kind == "rename":
                holder[rng.choice((f"{key}x", "../" + key, "", "\0", "__metadata__"))] = moved
        else:
            del holder[key]
    return value


def _place(value, rng):
    """`(container, key)` found by walking down: every level is as likely, however wide a vocabulary is."""
    place = None
    while isinstance(value, (dict, list)) and value and (place is None or rng.random() < 0.65):
        key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        place = value, key
        value = value[key]
    return place


def json_bytes(raw: bytes, rng: random.Random) -> bytes:
    """A JSON file: a changed tree, mostly, or changed bytes."""
    if rng.random() < 0.25:
        return bytes_of(raw, rng)
    return json.dumps(tree(json.loads(raw), rng)).encode("utf-8", "surrogatepass")


def safetensors(raw: bytes, rng: random.Random) -> bytes:
    kind = rng.choice(("bytes", "length", "header", "header", "header", "overlap", "twice"))
    if kind == "bytes":
        return bytes_of(raw, rng)
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    if kind == "length":
        wrong = rng.choice((0, 1, length - 1, length + 1, 2**20, 2**40, 2**63, 2**64 - 1, len(raw)))
        return wrong.to_bytes(8, "little") + raw[8:]
    names = [name for name in header if name != "__metadata__"]
    if kind == "header":
        header = tree(header, rng)
        text = json.dumps(header)
    elif kind == "overlap":
        a, b = rng.choice(names), rng.choice(names)
        header[a] = {**header[a], "data_offsets": header[b]["data_offsets"], "shape": header[b]["shape"]}
        text = json.dumps(header)
    else:
        name = rng.choice(names)
        text = json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(header[rng.choice(names)])}" + "}"
    text = text.encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + data


def gguf(raw: bytes, rng: random.Random) -> bytes:
    """Mostly in its head, where the counts, lengths, types and offsets are."""
    head = min(len(raw), 12_000)
    if rng.random() < 0.3:
        return bytes_of(raw, rng)
    if rng.random() < 0.5:
        return flip(raw[:head], rng) + raw[head:]
    at = rng.choice((4, 8, 16, rng.randrange(24, head - 8)))
    number = rng.choice((0, 1, 2, 3, 255, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1))
    wide = rng.choice(("<I", "<Q"))
    packed = struct.pack(wide, number % 2 ** (32 if wide == "<I" else 64))
    return raw[:at] + packed + raw[at + len(packed) :]


class Touch:
    """Unpickling this makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def npz(raw: bytes, rng: random.Random, canary) -> bytes:
    """A cache file: changed bytes, a member that is a pickle, one that declares terabytes, one that inflates."""
    kind = rng.choice(("bytes", "bytes", "pickle", "declared", "inflates", "dropped", "shape"))
    if kind == "bytes":
        return bytes_of(raw, rng)
    arrays = dict(np.load(io.BytesIO(raw)))
    name = rng.choice(sorted(arrays))
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for key, array in arrays.items():
            member = io.BytesIO()
            np.save(member, array)
            content = member.getvalue()
            if key == name and kind == "dropped":
                continue
            if key == name and kind == "pickle":
                content = _npy("|O", (1,), pickle.dumps([Touch(canary)]))
            if key == name and kind == "declared":
                content = _npy("<f8", rng.choice(((2**40,), (2**31, 2**31), (2**62,))), b"")
            if key == name and kind == "shape":
                content = _npy(rng.choice(("<i4", "<i8", "|u1", "<f4")), (rng.randrange(9),), rng.randbytes(72))
            if key == name and kind == "inflates":
                content = _npy("|u1", (2**23,), b"\0" * 2**23)
            archive.writestr(f"{key}.npy", content)
    return out.getvalue()


def _npy(dtype, shape, data) -> bytes:
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape!r}, }}".encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


def npz_with_pickle(canary) -> bytes:
    """An npz file with one array `a`, whose reading as a pickle makes the file `canary`."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a.npy", _npy("|O", (1,), pickle.dumps([Touch(canary)])))
    return out.getvalue()
