"""MXFP4 tensors of a Hugging Face folder (gpt-oss) as views that are dequantised when they are read.

    `NAME_blocks` uint8 [E, D_out, G, 16], `NAME_scales` uint8 [E, D_out, G]   ->   NAME [E, D_in, D_out], D_in = 32 G

A block is 32 numbers of 4 bits (sign, two bits of exponent, one of mantissa), the lower nibble first, times
`2^(scale - 127)`. Every product is exact in bfloat16. OCP Microscaling Formats 1.0.
"""

import dataclasses

import ml_dtypes
import numpy as np

from molora_jax.errors import InputError
from molora_jax.io.quants import FP4

BLOCKS, SCALES = "_blocks", "_scales"


@dataclasses.dataclass(frozen=True)
class Packed:
    """A tensor that is still packed: what a reader asks of an array, and its values when it is indexed."""

    blocks: np.ndarray
    scales: np.ndarray
    dtype = np.dtype(ml_dtypes.bfloat16)

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, out, groups, _ = self.blocks.shape
        return *lead, groups * 32, out

    def __array__(self, dtype=None, copy=None):
        return self[...].astype(dtype or self.dtype, copy=False)

    def __getitem__(self, index):
        return np.swapaxes(dequantize(self.blocks, self.scales), -1, -2)[index]


def dequantize(blocks, scales) -> np.ndarray:
    """`[..., G, 16]` and `[..., G]`, uint8, -> float32 `[..., 32 G]`."""
    pairs = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*blocks.shape[:-1], 32)
    values = np.ldexp(FP4[pairs], scales[..., None].astype(np.int32) - 127)
    return values.reshape(*blocks.shape[:-2], -1)


def joined(views: dict, where: str) -> dict:
    """`views` by name with every pair of blocks and scales as one `Packed`.

    Raises:
      InputError: one without the other, or shapes that do not belong together.
    """
    out = {}
    for name, view in views.items():
        stem = name.removesuffix(BLOCKS).removesuffix(SCALES)
        if stem == name:
            out[name] = view
            continue
        blocks, scales = views.get(stem + BLOCKS), views.get(stem + SCALES)
        fits = blocks is not None and scales is not None and blocks.dtype == scales.dtype == np.uint8
        if not fits or blocks.ndim < 3 or blocks.shape[-1] != 16 or blocks.shape[:-1] != scales.shape:
            raise InputError(
                f"{where}: tensor {name[:200]}", got="blocks and scales that do not belong together",
                expected=f"uint8 {BLOCKS} [..., G, 16] and {SCALES} [..., G]",
            )  # fmt: skip
        out[stem] = Packed(blocks, scales)
    return out
