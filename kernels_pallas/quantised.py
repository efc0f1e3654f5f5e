"""A frozen kernel in 8 or 4 bits: what lies in memory, and the dense kernel of what is read of it.

    int8   W = (codes * scale + low) * unit               codes uint8 [..., D_in, D_out],
           scale, low float16 [..., blocks, D_out], unit float32 [..., 1, 1]
    nf4    W = NF4[codes] * c,   c = absmax * step + mean a block of `block` rows of a column
           codes uint8 [..., D_in / 2, D_out] (rows 2i, the high half, and 2i + 1), absmax int8 [..., blocks, D_out],
           step float32 [..., 1, D_out], mean float32 [..., 1, 1]

Blocks run along D_in, as in the `[D_out, D_in]` of other programs, so a shard of D_out has all of its own; one of D_in
has whole blocks where its rows are a multiple of `block`. Leading axes (layers, experts) are stacked and may be cut.
D_in, D_out widths. How it is made: `molora_jax/core/quant.py`.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

F32 = jnp.float32
NF4 = (  # quantiles of a normal, Dettmers et al. 2023 (arXiv 2305.14314), appendix E
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
FORMS = ("int8", "nf4")


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class Quantised:
    """`arrays` by name, as above (or what stands for them: shapes, specs); `dtype` is that of the dense kernel."""

    arrays: dict[str, Any]
    form: str
    block: int
    dtype: Any

    def tree_flatten_with_keys(self):
        names = tuple(sorted(self.arrays))
        children = tuple((jax.tree_util.DictKey(name), self.arrays[name]) for name in names)
        return children, (names, self.form, self.block, self.dtype)

    @classmethod
    def tree_unflatten(cls, aux, children):
        names, *rest = aux
        return cls(dict(zip(names, children, strict=True)), *rest)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the dense kernel."""
        *lead, rows, columns = self.arrays["codes"].shape
        return (*lead, rows * (2 if self.form == "nf4" else 1), columns)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        return sum(math.prod(a.shape) * a.dtype.itemsize for a in self.arrays.values())

    def __getitem__(self, index) -> "Quantised":
        """The part at an index of the leading axes."""
        return self.map(lambda a: a[index])

    def map(self, function) -> "Quantised":
        """With `function` of every array."""
        return dataclasses.replace(self, arrays={name: function(a) for name, a in self.arrays.items()})


def is_quantised(W) -> bool:
    return isinstance(W, Quantised)


@jax.named_scope("dequantise")
def dense(W, dtype=None):
    """A kernel `[..., D_in, D_out]` as one array; one that is not quantised as it is (or in `dtype`)."""
    if not is_quantised(W):
        return W if dtype is None else W.astype(dtype)
    codes = W.arrays["codes"]
    low = None
    if W.form == "int8":
        values = codes.astype(F32)
        scale, low = (W.arrays[name].astype(F32) * W.arrays["unit"] for name in ("scale", "low"))
    else:
        values = jnp.stack([_nf4(codes >> 4), _nf4(codes & 15)], axis=-2).reshape(W.shape)
        scale = W.arrays["absmax"].astype(F32) * W.arrays["step"] + W.arrays["mean"]
    *lead, rows, columns = W.shape
    blocks = scale.shape[-2]
    if blocks > 1 and blocks * W.block == rows:
        values = values.reshape(*lead, blocks, W.block, columns)
        scale, low = (None if a is None else a[..., None, :] for a in (scale, low))
    elif blocks > 1:  # the last block is shorter
        rowwise = lambda a: jnp.repeat(a, W.block, axis=-2)[..., :rows, :]  # noqa: E731
        scale, low = (None if a is None else rowwise(a) for a in (scale, low))
    values = values * scale if low is None else values * scale + low
    return values.reshape(W.shape).astype(dtype or W.dtype)


def _nf4(codes):
    """The table's values, by comparisons: a product's operand, fused; a gather would be an array of its own."""

    def pick(low, bit):
        if bit < 0:
            return jnp.array(NF4[low], F32)
        return jnp.where(codes & (1 << bit) != 0, pick(low + (1 << bit), bit - 1), pick(low, bit - 1))

    return pick(0, 3)


def finer(W: Quantised, ways: int) -> Quantised:
    """The same kernel in blocks that end where `ways` shards of D_in end."""
    rows, held = W.shape[-2] // ways, {"int8": ("scale", "low"), "nf4": ("absmax",)}[W.form]
    if ways == 1 or W.arrays[held[0]].shape[-2] == 1 or rows % W.block == 0:
        return W
    block = math.gcd(W.block, rows)
    again = lambda a: jnp.repeat(a, W.block // block, axis=-2)[..., : W.shape[-2] // block, :]  # noqa: E731
    return dataclasses.replace(W, arrays=W.arrays | {name: again(W.arrays[name]) for name in held}, block=block)
