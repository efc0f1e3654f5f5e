"""What the TPU kernels share: each chip's VMEM, the choice of tiles that fit it, exact dots, and the ragged schedule.

A kernel asks for most of VMEM explicitly (the compiler's default is 16 MiB on a v5e) and its tiles halve until the
blocks, twice for double buffering, fit. Too large a block is a compile error, so `tests/kernels/test_mosaic.py`
compiles every named shape for every chip.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.platform import device_kind_of

F32 = jnp.float32
MIB = 1 << 20

# VMEM as the compiler sees it, by the lower-case device kind; first match.
VMEM_BYTES = {"v5 lite": 128 * MIB, "v5e": 128 * MIB, "v6": 128 * MIB, "v5": 64 * MIB, "7x": 64 * MIB}
SMALLEST = 64 * MIB

NN, NT, TN = ((1,), (0,)), ((1,), (1,)), ((0,), (0,))


def vmem_bytes(device_kind: str | None = None) -> int:
    """VMEM of the chip: the argument, the mesh in context, or the smallest that is known."""
    kind = (device_kind or device_kind_of() or "").lower()
    return next((size for key, size in VMEM_BYTES.items() if key in kind), SMALLEST)


def limit(device_kind: str | None = None) -> int:
    """The fraction of VMEM that a kernel may plan with; the rest is the compiler's."""
    return vmem_bytes(device_kind) * 3 // 4


def fit(op: str, candidates, bytes_of, device_kind: str | None = None):
    """The first candidate whose blocks fit.

    Raises:
      ValueError: none does; the message says how much the smallest needs.
    """
    room = limit(device_kind)
    for tiles in candidates:
        if bytes_of(*tiles) <= room:
            return tiles
    raise ValueError(
        f"{op} has no TPU tile for this shape: the smallest, {tiles}, needs {bytes_of(*tiles) / MIB:.0f} MiB of VMEM "
        f"and the kernel may use {room / MIB:.0f}. Use another implementation."
    )


def dot(a, b, contract):
    """A product accumulated in float32; float32 operands are multiplied exactly (the MXU would round them to bf16)."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == F32 else None
    return jax.lax.dot_general(a, b, (contract, ((), ())), precision=precision, preferred_element_type=F32)


def params(device_kind: str | None, *semantics: str):
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=limit(device_kind))


def row_mask(start, rows: int, low, high):
    """`[rows, 1]`: which rows of the tile that begins at `start` lie in `[low, high)`."""
    row = start + jax.lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
    return (row >= low) & (row < high)


def visits(counts, num_rows: int, rows: int):
    """The schedule of a ragged product over rows sorted by expert: which expert works on which row tile.

    A tile is visited once for every expert that owns rows of it; `cdiv(num_rows, rows) + E - 1` visits always suffice.
    Those not needed repeat the last one with an empty range.

    Args:
      counts: `[E]` int32 rows of each expert, in order.

    Returns:
      `expert, tile, low, high, first_of_tile, first_of_expert`, each `[visits]` int32.
    """
    E = len(counts)
    V = -(-num_rows // rows) + E - 1
    end = jnp.cumsum(counts)
    start = end - counts
    each = jnp.where(counts > 0, (end - 1) // rows - start // rows + 1, 0)
    last = jnp.cumsum(each)
    v = jnp.arange(V, dtype=jnp.int32)
    used = jnp.minimum(v, jnp.maximum(last[-1] - 1, 0))
    e = jnp.minimum(jnp.searchsorted(last, used, side="right"), E - 1).astype(jnp.int32)
    tile = jnp.where(last[-1] > 0, start[e] // rows + used - (last - each)[e], 0)
    real = v < last[-1]
    low, high = jnp.where(real, start[e], 0), jnp.where(real, end[e], 0)
    first = lambda x: jnp.concatenate([jnp.ones(1, bool), x[1:] != x[:-1]])  # noqa: E731
    return tuple(a.astype(jnp.int32) for a in (e, tile, low, high, first(tile), first(e)))
