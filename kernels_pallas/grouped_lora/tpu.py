"""`grouped_lora` on TPU (Mosaic): rows sorted by expert, ragged groups, the rank-R intermediate only in VMEM.

    y_s = w_s (x_s A_e^T) B_e        s: the slots, sorted by expert; a tile of rows is visited once an expert in it

XLA gathers the rows into their order and takes each token's sum by K gathers: no atomics, no scatter. The kernels mask
only what has width R, and the rows where a contraction runs over them: rows of other experts or past the end may hold
anything. The backward is one kernel: x and dy read once, dx written once, dA_e and dB_e summed in VMEM while
consecutive visits have the same expert. Experts that nobody visits are set to exactly zero outside.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import order
from kernels_pallas.mosaic import F32, NN, NT, TN, dot, fit, params, row_mask, visits
from kernels_pallas.zeros import gated

ROWS = (256, 128, 64, 32, 16, 8)


def _bytes(rows, R, D_in, D_out, size):
    streams = 2 * rows * ((2 * D_in + D_out) * size + 2 * 128 * 4)
    factors = 2 * max(R, 8) * (D_in + D_out) * (size + 4)
    exact = 0 if size < 4 else 6 * (rows + R) * (D_in + D_out)  # float32 operands split into bfloat16 parts
    return streams + factors + exact + rows * (2 * D_in + D_out) * 4 + 8 * rows * 128 * 4


def rows_that_fit(N, R, D_in, D_out, size, device_kind=None) -> int:
    """Rows of a tile. Raises ValueError where even eight do not fit in VMEM."""
    candidates = [(r,) for r in ROWS if r == ROWS[-1] or r < 2 * N]
    need = functools.partial(_bytes, R=R, D_in=D_in, D_out=D_out, size=size)
    return fit("grouped_lora", candidates, lambda rows: need(rows), device_kind)[0]


def _forward_kernel(e, m, low, high, first_tile, first_expert, x, w, A, B, y):
    v, rows = pl.program_id(0), x.shape[0]
    mine = row_mask(m[v] * rows, rows, low[v], high[v])
    u = jnp.where(mine, gated(w[...], dot(x[...], A[...], NT)), 0.0)
    part = dot(u.astype(x.dtype), B[...], NN)

    @pl.when(first_tile[v] == 1)
    def _():
        y[...] = part.astype(y.dtype)

    @pl.when(first_tile[v] == 0)
    def _():
        y[...] = jnp.where(mine, part.astype(y.dtype), y[...])


def _backward_kernel(e, m, low, high, first_tile, first_expert, x, w, dy, A, B, dx, dw, dA, dB):
    v, rows = pl.program_id(0), x.shape[0]
    mine = row_mask(m[v] * rows, rows, low[v], high[v])
    x_, dy_, w_ = (jnp.where(mine, a[...], 0) for a in (x, dy, w))
    z, du = dot(x_, A[...], NT), dot(dy_, B[...], NT)
    u, dz = gated(w_, z).astype(x.dtype), gated(w_, du).astype(x.dtype)
    part, dw_part = dot(dz, A[...], NN).astype(dx.dtype), jnp.sum(z * du, axis=1, keepdims=True)

    @pl.when(first_tile[v] == 1)
    def _():
        dx[...] = part
        dw[...] = dw_part

    @pl.when(first_tile[v] == 0)
    def _():
        dx[...] = jnp.where(mine, part, dx[...])
        dw[...] = jnp.where(mine, dw_part, dw[...])

    @pl.when(first_expert[v] == 1)
    def _():
        dA[...] = jnp.zeros_like(dA)
        dB[...] = jnp.zeros_like(dB)

    dA[...] += dot(dz, x_, TN)
    dB[...] += dot(u, dy_, TN)


def _rows(rows, *widths):
    return [pl.BlockSpec((rows, width), lambda v, e, m, *_: (m[v], 0)) for width in widths]


def _experts(R, *widths):
    return [pl.BlockSpec((None, R, width), lambda v, e, m, *_: (e[v], 0, 0)) for width in widths]


def _call(kernel, rows, schedule, arrays, in_specs, out_specs, out_shape, flops, interpret, device_kind):
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(schedule), grid=(len(schedule[0]),), in_specs=in_specs, out_specs=out_specs
    )
    moved = sum(a.size * a.dtype.itemsize for a in (*arrays, *jax.tree.leaves(out_shape)))
    return pl.pallas_call(
        kernel,
        grid_spec=grid,
        out_shape=out_shape,
        compiler_params=params(device_kind, "arbitrary"),
        cost_estimate=pl.CostEstimate(flops=flops, bytes_accessed=moved, transcendentals=0),
        interpret=interpret,
    )(*schedule, *arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sorted(interpret, device_kind, x, w, A, B, counts):
    """`x [N, D_in]`, `w [N, 1]` sorted by expert, `counts [E]` -> `[N, D_out]`; rows past the last expert undefined."""
    return _forward(interpret, device_kind, x, w, A, B, counts)[0]


def _forward(interpret, device_kind, x, w, A, B, counts):
    (N, D_in), (_, R, D_out) = x.shape, B.shape
    rows = rows_that_fit(N, R, D_in, D_out, x.dtype.itemsize, device_kind)
    y = _call(
        _forward_kernel, rows, visits(counts, N, rows), (x, w, A.astype(x.dtype), B.astype(x.dtype)),
        [*_rows(rows, D_in, 1), *_experts(R, D_in, D_out)], _rows(rows, D_out)[0],
        jax.ShapeDtypeStruct((N, D_out), x.dtype), 2 * N * R * (D_in + D_out), interpret, device_kind,
    )  # fmt: skip
    return y, (x, w, A, B, counts)


def _backward(interpret, device_kind, saved, dy):
    x, w, A, B, counts = saved
    (N, D_in), (_, R, D_out) = x.shape, B.shape
    rows = rows_that_fit(N, R, D_in, D_out, x.dtype.itemsize, device_kind)
    shapes = [(x.shape, x.dtype), (w.shape, F32), (A.shape, F32), (B.shape, F32)]
    dx, dw, dA, dB = _call(
        _backward_kernel, rows, visits(counts, N, rows), (x, w, dy, A.astype(x.dtype), B.astype(x.dtype)),
        [*_rows(rows, D_in, 1, D_out), *_experts(R, D_in, D_out)],
        [*_rows(rows, D_in, 1), *_experts(R, D_in, D_out)],
        [jax.ShapeDtypeStruct(*s) for s in shapes], 6 * N * R * (D_in + D_out), interpret, device_kind,
    )  # fmt: skip
    own = (counts > 0)[:, None, None]
    return dx, dw, jnp.where(own, dA, 0).astype(A.dtype), jnp.where(own, dB, 0).astype(B.dtype), None


_sorted.defvjp(_forward, _backward)


def _ranks(A):
    """Rank padded with zeros to a whole sublane tile of 8, which it takes up in VMEM anyway."""
    return jnp.pad(A, ((0, 0), (0, -A.shape[1] % 8), (0, 0)))


def grouped_lora(x, A, B, idx, gates, *, interpret=False, device_kind=None):
    """Shapes as in `api.grouped_lora`; `interpret` as in `pallas_call`; `device_kind` sizes the tiles."""
    E = B.shape[0]
    A, B = (_ranks(jnp.broadcast_to(M, (E, *M.shape[1:]))) for M in (A, B))
    rows = order.by_expert(idx, E)
    w = order.arrange(jnp.where(rows.used, gates, 0.0).astype(F32)[..., None], rows)
    y = _sorted(interpret, device_kind, order.spread(x, rows), w, A, B, rows.sizes)
    return order.combine(y, rows)
