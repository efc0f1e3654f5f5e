"""The frozen kernels of a base in 8 or 4 bits (`base.quant`): which, how, and how many bytes they are.

    int8   blocks of 32 along D_in, between the least and the greatest weight of each: code = round((w - low) / scale),
           scale = (high - low) / 255; both in float16, as parts of the greatest |w| of the kernel
    nf4    QLoRA's NormalFloat (arXiv 2305.14314): blocks of 64 along D_in, code = the nearest of 16 quantiles to w / c,
           c = max |w| of the block. The c are quantised too: a = round((c - mean) / step), the mean of a kernel's,
           step = max |c - mean| / 127 of an output channel's

QLoRA quantises 256 neighbouring c together, in an 8-bit float; here those of one output channel are, as integers: no
group then crosses two shards, at 4 bytes a channel more. Bytes of one kernel `[D_in, D_out]`:

    int8   D_in D_out + 4 ceil(D_in / 32) D_out + 4
    nf4    D_in D_out / 2 + ceil(D_in / 64) D_out + 4 D_out + 4

A scale an output channel was tried first for int8, and left: it rounds SmolLM2's kernels 1.6 times as coarsely. Blocks
of 32 with a least weight hold what 4-bit GGUF files say (16 even steps in each 32 weights) to float16's rounding.

Quantised are the kernels of projections and of a base's experts (`Leaf.product`); embeddings, head, norms, biases,
routers, convolutions and states stay. Nothing is drawn: equal weights are equal codes.
"""

import math

import jax
import numpy as np

from kernels_pallas.quantised import FORMS, NF4, Quantised, dense, finer, is_quantised
from molora_jax.core import trees
from molora_jax.errors import InputError

__all__ = ["BLOCK", "FORMS", "Quantised", "dense", "empty", "finer", "is_quantised", "num_bytes", "quantise"]
BLOCK, BLOCK8 = 64, 32
FORMULAS = {
    "int8": f"D_in D_out + 4 ceil(D_in / {BLOCK8}) D_out + 4",
    "nf4": f"D_in D_out / 2 + ceil(D_in / {BLOCK}) D_out + 4 D_out + 4",
}
_HALF = (np.array(NF4[1:], np.float32) + np.array(NF4[:-1], np.float32)) / 2  # between neighbours


def num_bytes(shape: tuple[int, ...], form: str) -> int:
    """Of kernels `[..., D_in, D_out]`: the formula above."""
    *lead, d_in, d_out = shape
    if form == "int8":
        return math.prod(lead) * (d_in * d_out + 4 * -(-d_in // BLOCK8) * d_out + 4)
    return math.prod(lead) * (d_in * d_out // 2 + (-(-d_in // BLOCK) + 4) * d_out + 4)


def empty(shape: tuple[int, ...], form: str, dtype, make=np.empty, *, where: str = "kernel") -> Quantised:
    """Room for kernels of a shape; `make(shape, dtype)` gives an array (or what stands for one).

    Raises:
      InputError: nf4 of an odd D_in (`where`): two rows share a byte.
    """
    *lead, d_in, d_out = shape
    if form == "nf4" and d_in % 2:
        raise InputError("base.quant", got=f"'nf4' for {where} of {d_in} rows", expected="even widths", fix="Use int8.")
    if form == "int8":
        held = ((-(-d_in // BLOCK8), d_out), np.float16)
        sizes = {"codes": ((d_in, d_out), np.uint8), "scale": held, "low": held, "unit": ((1, 1), np.float32)}
    else:
        sizes = {
            "codes": ((d_in // 2, d_out), np.uint8), "absmax": ((-(-d_in // BLOCK), d_out), np.int8),
            "step": ((1, d_out), np.float32), "mean": ((1, 1), np.float32),
        }  # fmt: skip
    arrays = {name: make((*lead, *own), np.dtype(kind)) for name, (own, kind) in sizes.items()}
    return Quantised(arrays, form, BLOCK if form == "nf4" else BLOCK8, np.dtype(dtype))


def quantise(W: np.ndarray, out: Quantised) -> None:
    """Writes kernels `[..., D_in, D_out]`, finite, into `out`: one at a time is held in float32."""
    for place in np.ndindex(*W.shape[:-2]):
        own = {"int8": _int8, "nf4": _nf4}[out.form](np.ascontiguousarray(W[place], np.float32))
        for name, values in own.items():
            out.arrays[name][place] = values


def _blocks(w, block):
    """`w [D_in, D_out]` as `[blocks, block, D_out]`; its last rows are repeated to a whole block."""
    short = -len(w) % block
    return np.pad(w, ((0, short), (0, 0)), mode="edge").reshape(-1, block, w.shape[1])


def _int8(w):
    unit = np.abs(w).max() or np.float32(1)
    parts = _blocks(w / unit, BLOCK8)
    low, high = (end.astype(np.float16) for end in (parts.min(axis=1), parts.max(axis=1)))
    scale = ((high.astype(np.float32) - low.astype(np.float32)) / np.float32(255)).astype(np.float16)
    step = np.where(scale > 0, scale, 1).astype(np.float32)[:, None]
    codes = np.clip(np.rint((parts - low.astype(np.float32)[:, None]) / step), 0, 255).astype(np.uint8)
    return {
        "codes": codes.reshape(-1, w.shape[1])[: len(w)], "scale": scale, "low": low,
        "unit": np.float32(unit).reshape(1, 1),
    }  # fmt: skip


def _nf4(w):
    parts = _blocks(w, BLOCK)
    c = np.abs(parts).max(axis=1)
    unit = parts * (np.float32(1) / np.where(c > 0, c, 1))[:, None]
    codes = np.zeros(unit.shape, np.uint8)
    for bound in _HALF:
        codes += unit > bound
    codes = codes.reshape(-1, w.shape[1])[: len(w)]
    mean = np.float32(c.mean(dtype=np.float64))
    step = np.abs(c - mean).max(axis=0, keepdims=True) / np.float32(127)
    absmax = np.rint((c - mean) / np.where(step > 0, step, 1)).astype(np.int8)
    return {"codes": codes[::2] << 4 | codes[1::2], "absmax": absmax, "step": step, "mean": mean.reshape(1, 1)}


def quantised_tree(backbone, params: dict, form: str) -> dict:
    """`params` (numpy) with the kernels that `form` quantises."""
    leaves = backbone.shapes()

    def of_leaf(path, leaf):
        name = trees.name_of(path)
        if not leaves[name].product:
            return leaf
        out = empty(leaf.shape, form, leaf.dtype, where=name)
        quantise(leaf, out)
        return out

    return jax.tree_util.tree_map_with_path(of_leaf, params)
