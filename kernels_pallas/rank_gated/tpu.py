"""`rank_gated` on TPU (Mosaic): the rank-wide intermediate `[T, E*R]` never leaves VMEM, forward or backward.

    u = x A^T,  m = gates S,  y = (m u) B          S [E, E*R]: which columns are an expert's

All of A and B lie in VMEM, rows stream past. The backward reads x and dy once, writes dx and dgates once, and keeps the
sums of dA and dB in VMEM. Gates of exactly 0 select nothing, even where z is not finite: what a row whose gates are
all 0 may hold, and how its dgates then come out, is as in `dense.py`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas.mosaic import F32, NN, NT, TN, dot, fit, params, row_mask
from kernels_pallas.zeros import gated

ROWS = (512, 256, 128, 64, 32, 16, 8)


def _bytes(rows, T, columns, E, D_in, D_out, size, backward):
    tile = 2 * rows * ((2 if backward else 1) * (D_in + D_out) * size + 2 * 128 * 4)
    weights = 2 * columns * (D_in + D_out) * size
    sums = 2 * columns * (D_in + D_out) * 4 if backward else 0
    exact = 0 if size < 4 else 6 * (columns + rows) * (D_in + D_out)  # float32 operands split into bfloat16 parts
    return tile + weights + sums + exact + 6 * rows * max(columns, 128) * 4 + rows * (D_in + D_out) * 4


def rows_that_fit(T, columns, E, D_in, D_out, size, backward, device_kind=None) -> int:
    """Rows of a tile. Raises ValueError where A and B do not fit in VMEM."""
    candidates = [(r,) for r in ROWS if r == ROWS[-1] or r < 2 * T]
    need = functools.partial(_bytes, T=T, columns=columns, E=E, D_in=D_in, D_out=D_out, size=size, backward=backward)
    return fit("rank_gated", candidates, lambda rows: need(rows), device_kind)[0]


def _select(E, columns):
    """S, made outside: an integer division in a kernel needs to know the chip when it is lowered."""
    return (jnp.arange(columns) // (columns // E) == jnp.arange(E)[:, None]).astype(F32)


def _forward_kernel(x, gates, S, A, B, y):
    m = dot(gates[...], S[...], NN)
    u = gated(m, dot(x[...], A[...], NT))
    y[...] = dot(u.astype(x.dtype), B[...], NN).astype(y.dtype)


def _backward_kernel(T, x, gates, dy, S, A, B, dx, dgates, dA, dB):
    i, rows = pl.program_id(0), x.shape[0]
    real = row_mask(i * rows, rows, 0, T)  # the last tile reads past the end: it may hold anything
    x_, dy_, gates_ = (jnp.where(real, a[...], 0) for a in (x, dy, gates))
    on = jnp.max(jnp.where(gates_ == 0, 0.0, 1.0), axis=1, keepdims=True) > 0
    m = dot(gates_, S[...], NN)
    z, du = dot(x_, A[...], NT), dot(dy_, B[...], NT)
    dg = dot(z * du, S[...], NT)
    dgates[...] = jnp.where(on | (jnp.abs(dg) < jnp.inf), dg, 0.0)
    dz, u = gated(m, du).astype(x.dtype), gated(m, z).astype(x.dtype)
    dx[...] = dot(dz, A[...], NN).astype(dx.dtype)

    @pl.when(i == 0)
    def _():
        dA[...] = jnp.zeros_like(dA)
        dB[...] = jnp.zeros_like(dB)

    dA[...] += dot(dz, jnp.where(on, x_, 0), TN)
    dB[...] += dot(u, dy_, TN)


def _specs(rows, *widths):
    return [pl.BlockSpec((rows, width), lambda i: (i, 0)) for width in widths]


def _whole(*arrays):
    return [pl.BlockSpec(a.shape, lambda i: (0, 0)) for a in arrays]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _op(interpret, device_kind, x, A, B, gates):
    return _forward(interpret, device_kind, x, A, B, gates)[0]


def _flat(A, dtype):
    return A.reshape(-1, A.shape[-1]).astype(dtype)


def _forward(interpret, device_kind, x, A, B, gates):
    (T, D_in), (E, R, D_out) = x.shape, B.shape
    rows = rows_that_fit(T, E * R, E, D_in, D_out, x.dtype.itemsize, False, device_kind)
    whole = _select(E, E * R), _flat(A, x.dtype), _flat(B, x.dtype)
    y = pl.pallas_call(
        _forward_kernel,
        grid=(pl.cdiv(T, rows),),
        in_specs=[*_specs(rows, D_in, E), *_whole(*whole)],
        out_specs=_specs(rows, D_out)[0],
        out_shape=jax.ShapeDtypeStruct((T, D_out), x.dtype),
        compiler_params=params(device_kind, "parallel"),
        cost_estimate=pl.CostEstimate(
            flops=2 * T * E * R * (D_in + D_out),
            bytes_accessed=(T + E * R) * (D_in + D_out) * x.dtype.itemsize,
            transcendentals=0,
        ),
        interpret=interpret,
    )(x, gates.astype(F32), *whole)
    return y, (x, A, B, gates)


def _backward(interpret, device_kind, saved, dy):
    x, A, B, gates = saved
    (T, D_in), (E, R, D_out) = x.shape, B.shape
    rows = rows_that_fit(T, E * R, E, D_in, D_out, x.dtype.itemsize, True, device_kind)
    whole = _select(E, E * R), _flat(A, x.dtype), _flat(B, x.dtype)
    sums = [jax.ShapeDtypeStruct(a.shape, F32) for a in whole[1:]]
    dx, dgates, dA, dB = pl.pallas_call(
        functools.partial(_backward_kernel, T),
        grid=(pl.cdiv(T, rows),),
        in_specs=[*_specs(rows, D_in, E, D_out), *_whole(*whole)],
        out_specs=[*_specs(rows, D_in, E), *_whole(*sums)],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct((T, E), F32), *sums],
        compiler_params=params(device_kind, "arbitrary"),
        cost_estimate=pl.CostEstimate(
            flops=6 * T * E * R * (D_in + D_out),
            bytes_accessed=(2 * T * D_in + T * D_out + E * R * (D_in + D_out)) * x.dtype.itemsize,
            transcendentals=0,
        ),
        interpret=interpret,
    )(x, gates.astype(F32), dy, *whole)
    return dx, dA.reshape(A.shape).astype(A.dtype), dB.reshape(B.shape).astype(B.dtype), dgates.astype(gates.dtype)


_op.defvjp(_forward, _backward)


def rank_gated(x, A, B, gates, *, interpret=False, device_kind=None):
    """Shapes as in `api.rank_gated`; `interpret` as in `pallas_call`; `device_kind` sizes the tiles."""
    return _op(interpret, device_kind, x, jnp.broadcast_to(A, (B.shape[0], *A.shape[1:])), B, gates)
