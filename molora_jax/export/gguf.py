"""A GGUF LoRA adapter, as llama.cpp's `--lora` reads it: `adapter.gguf`, float32.

    general.type = adapter, general.architecture, adapter.type = lora, adapter.lora.alpha
    blk.0.attn_q.weight.lora_a [R, D_in], .lora_b [D_out, R]          (GGUF says dimensions fastest first)

llama.cpp multiplies by alpha / R of each tensor: every scale is in B, all ranks are one, and alpha is R. Where an
architecture (llama, smollm3) has the rows of q and k interleaved, so has `lora_b` of these; where several sites are one
tensor (phi3), B of each is 0 in the rows of the others. Layout of the file: `io/gguf.py`; names: `io/gguf_arch.py`.
"""

import struct

import numpy as np

from molora_jax.export import vllm
from molora_jax.export.base import Source, in_rows, stacked
from molora_jax.io.files import named
from molora_jax.io.gguf_arch import ARCHITECTURES
from molora_jax.io.gguf_model import interleaved
from molora_jax.runs.products import products

NAMES = {row.family: name for name, row in ARCHITECTURES.items()} | {"mistral": "llama"}  # of a base's family
ALIGNMENT = 32
FLOAT32, STRING = 6, 8


def write(source: Source, folder) -> list[str]:
    source.check_static(experts=False)
    family = source.backbone.family
    if family not in NAMES:
        raise source.refuse(f"on a base of the family {family}", f"one of {', '.join(NAMES)}")
    row, found = ARCHITECTURES[NAMES[family]], {}
    every = products(source.opened.model, source.opened.items["adapters"], refuse=source.refuse)
    for (_, layer, site), (A, B) in every.items():
        heads = {"q": source.backbone.heads, "k": source.backbone.kv_heads}.get(site)
        B = B if heads is None or not row.permuted else interleaved(B.T, heads).T
        pair = A, in_rows(B, source.place(layer, site)[1])
        found.setdefault(f"{row.names[site].format(i=layer)}.weight", []).append(pair)
    arrays = {}
    for name, (A, B) in vllm.padded({name: stacked(pairs) for name, pairs in found.items()}).items():
        arrays |= {f"{name}.lora_a": A, f"{name}.lora_b": B.T}
    rank = len(arrays[next(iter(arrays))])
    metadata = {
        "general.type": "adapter", "general.architecture": NAMES[family],
        "general.name": source.opened.folder.name, "adapter.type": "lora", "adapter.lora.alpha": float(rank),
    }  # fmt: skip
    with named(folder / "adapter.gguf"):
        (folder / "adapter.gguf").write_bytes(encoded(metadata, arrays))
    return []


def encoded(metadata: dict, arrays: dict) -> bytes:
    """A GGUF file of version 3: texts and floats as metadata, float32 tensors."""
    text = lambda value: struct.pack("<Q", len(value.encode())) + value.encode()  # noqa: E731
    out = [b"GGUF", struct.pack("<IQQ", 3, len(arrays), len(metadata))]
    for name, value in metadata.items():
        kind, body = (STRING, text(value)) if isinstance(value, str) else (FLOAT32, struct.pack("<f", value))
        out += [text(name), struct.pack("<I", kind), body]
    data, at = [], 0
    for name, array in arrays.items():
        raw = np.ascontiguousarray(array, "<f4").tobytes()
        raw += b"\0" * (-len(raw) % ALIGNMENT)
        shape = array.shape[::-1]
        out += [text(name), struct.pack("<I", len(shape)), struct.pack(f"<{len(shape)}Q", *shape)]
        out += [struct.pack("<IQ", 0, at)]  # type 0: F32
        data, at = [*data, raw], at + len(raw)
    head = b"".join(out)
    return head + b"\0" * (-len(head) % ALIGNMENT) + b"".join(data)
