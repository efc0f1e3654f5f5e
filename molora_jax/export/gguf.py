"""A GGUF LoRA adapter, as llama.cpp's `--lora` reads it: `adapter.gguf`, float32.

    general.type = adapter, general.architecture, adapter.type = lora, adapter.lora.alpha
    blk.0.attn_q.weight.lora_a [R, D_in], .lora_b [D_out, R]          (GGUF says dimensions fastest first)

llama.cpp multiplies by alpha / R of each tensor: every scale is in B, all ranks are one, and alpha is R. The
architecture `llama` has the rows of q and k interleaved, so has `lora_b` of these. Layout of the file: `io/gguf.py`.
"""

import struct

import numpy as np

from molora_jax.export import vllm
from molora_jax.export.base import Source
from molora_jax.io.gguf_arch import LLAMA
from molora_jax.io.gguf_model import interleaved
from molora_jax.runs.products import products

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}  # of a base's family
ALIGNMENT = 32
FLOAT32, STRING = 6, 8


def write(source: Source, folder) -> list[str]:
    source.check_static(experts=False)
    family = source.backbone.family
    if family not in ARCHITECTURES:
        raise source.refuse(f"on a base of the family {family}", f"one of {', '.join(ARCHITECTURES)}")
    found: dict = {}
    every = products(source.opened.model, source.opened.items["adapters"], refuse=source.refuse)
    for (_, layer, site), pair in every.items():
        found.setdefault(f"{LLAMA[site].format(i=layer)}.weight", []).append((site, *pair))
    sites = {name: some[0][0] for name, some in found.items()}
    pairs = {name: tuple(np.concatenate([one[i] for one in some]) for i in (1, 2)) for name, some in found.items()}
    arrays = {}
    for name, (A, B) in vllm.padded(pairs).items():
        heads = {"q": source.backbone.heads, "k": source.backbone.kv_heads}.get(sites[name])
        B = B.T if heads is None or ARCHITECTURES[family] != "llama" else interleaved(B.T, heads)
        arrays |= {f"{name}.lora_a": A, f"{name}.lora_b": B}
    rank = len(arrays[next(iter(arrays))])
    metadata = {
        "general.type": "adapter", "general.architecture": ARCHITECTURES[family],
        "general.name": source.opened.folder.name, "adapter.type": "lora", "adapter.lora.alpha": float(rank),
    }  # fmt: skip
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
