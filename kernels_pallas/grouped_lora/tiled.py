"""The routed low-rank product by experts: loops over tiles of slots that share one expert, in pure XLA.

    z[t, k] = A[e_tk] x_t  [T, K, R]          y_t = sum_k g_tk B[e_tk] z[t, k]

Two loops with the rank-R intermediate between them, so that a caller may stop there (an FFN's experts) or do something
to it. Cost grows with the slots in use and not with E; nothing is dropped, an empty expert's gradient is exactly zero.
Reads of empty rows go through `where`, never through a product by zero.

T tokens, D width, E experts, K slots, R rank.
"""

import functools

import jax
import jax.numpy as jnp

from kernels_pallas import tiles
from kernels_pallas.zeros import gated

F32 = jnp.float32
NN, NT, TN = ((1,), (0,)), ((1,), (1,)), ((0,), (0,))


def _dot(a, b, contract):
    return jax.lax.dot_general(a, b, (contract, ((), ())), preferred_element_type=F32)


def _rows(x, i, valid):
    return jnp.where(valid, tiles.take(x, i), 0)


def _flat(z):
    return z.reshape(z.shape[0] * z.shape[1], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _shrink(K, x, A, schedule):
    return _shrink_forward(K, x, A, schedule)[0]


def _shrink_forward(K, x, A, schedule):
    saved = x, tiles.kept(A), schedule
    return tiles.one_by_one(functools.partial(_shrink_value, K), *saved), saved


@jax.named_scope("shrink")
def _shrink_value(K, x, A, schedule):
    def step(i, z):
        s = tiles.step(schedule, i)
        return tiles.add_rows(z, s.to_slot, _dot(tiles.take(x, s.token), tiles.expert(A, s.expert).astype(x.dtype), NT))

    (z,) = tiles.zeros((len(x) * K, A.shape[1]))
    z = tiles.loop(schedule.count, step, z)
    return z.reshape(len(x), K, -1)


def _shrink_backward(K, saved, dz):
    return tiles.one_by_one(_shrink_gradients, *saved, dz)


@jax.named_scope("shrink")
def _shrink_gradients(x, A, schedule, dz):
    dz = _flat(dz).astype(x.dtype)

    def step(i, carry):
        dx, dA = carry
        s = tiles.step(schedule, i)
        d = _rows(dz, s.slot, s.valid)
        dx = tiles.add_rows(dx, s.to_token, _dot(d, tiles.expert(A, s.expert).astype(x.dtype), NN))
        return dx, tiles.add_at(dA, s.expert, _dot(d, _rows(x, s.token, s.valid), TN))

    dx, dA = tiles.loop(schedule.count, step, tuple(tiles.zeros(x.shape, A.shape)))
    return dx.astype(x.dtype), tiles.gradient(A, dA), None


_shrink.defvjp(_shrink_forward, _shrink_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _expand(dtype, z, B, gates, schedule):
    return _expand_forward(dtype, z, B, gates, schedule)[0]


def _expand_forward(dtype, z, B, gates, schedule):
    saved = z, tiles.kept(B), gates, schedule
    return tiles.one_by_one(functools.partial(_expand_value, dtype), *saved), saved


@jax.named_scope("expand")
def _expand_value(dtype, z, B, gates, schedule):
    def step(i, y):
        s = tiles.step(schedule, i)
        u = gated(_rows(_flat(gates), s.slot, s.valid), _rows(_flat(z), s.slot, s.valid).astype(F32))
        return tiles.add_rows(y, s.to_token, _dot(u.astype(dtype), tiles.expert(B, s.expert).astype(dtype), NN))

    (y,) = tiles.zeros((len(z), B.shape[-1]))
    return tiles.loop(schedule.count, step, y).astype(dtype)


def _expand_backward(dtype, saved, dy):
    return tiles.one_by_one(functools.partial(_expand_gradients, dtype), *saved, dy)


@jax.named_scope("expand")
def _expand_gradients(dtype, z, B, gates, schedule, dy):
    def step(i, carry):
        dz, dw, dB = carry
        s = tiles.step(schedule, i)
        w, own = _rows(_flat(gates), s.slot, s.valid), _rows(_flat(z), s.slot, s.valid)
        d = _rows(dy, s.token, s.valid)
        du = _dot(d, tiles.expert(B, s.expert).astype(dtype), NT)
        dB = tiles.add_at(dB, s.expert, _dot(gated(w, own.astype(F32)).astype(dtype), d, TN))
        dw = tiles.add_rows(dw, s.to_slot, jnp.sum(du * own.astype(F32), axis=1))
        return tiles.add_rows(dz, s.to_slot, gated(w, du)), dw, dB

    N, R = z.shape[0] * z.shape[1], z.shape[2]
    dz, dw, dB = tiles.loop(schedule.count, step, tuple(tiles.zeros((N, R), (N,), B.shape)))
    return dz.reshape(z.shape).astype(z.dtype), tiles.gradient(B, dB), dw.reshape(gates.shape).astype(gates.dtype), None


_expand.defvjp(_expand_forward, _expand_backward)


def shrink(x, A, idx, *, rows=None, schedule=None):
    """`A[e] x` at the token's experts: `x [T, D]`, `A [E, R, D]`, `idx [T, K]` -> `[T, K, R]` float32, 0 if unused."""
    return _shrink(idx.shape[1], x, A, schedule or tiles.plan(idx, A.shape[0], rows))


def expand(z, B, idx, gates, *, dtype, rows=None, schedule=None):
    """`sum_k g_k B[e_k] z_k`: `z [T, K, R]`, `B [E, R, D]`, `idx, gates [T, K]` -> `[T, D]` in dtype."""
    return _expand(jnp.dtype(dtype), z, B, gates, schedule or tiles.plan(idx, B.shape[0], rows))


def grouped_lora(x, A, B, idx, gates, *, rows=None):
    """Shapes as in `api.grouped_lora`; `rows` of a tile, by default from the experts' load."""
    schedule = tiles.plan(idx, B.shape[0], rows)
    if A.shape[0] == 1:  # one A for all: a plain product
        used = idx < B.shape[0]
        rows = jnp.where(jnp.any(used, axis=1, keepdims=True), x, 0)  # dA contracts over all of them
        z = jnp.where(used[..., None], _dot(rows, tiles.plain(A)[0].astype(x.dtype), NT)[:, None, :], 0.0)
    else:
        z = shrink(x, A, idx, schedule=schedule)
    return expand(z, B, idx, gates, dtype=x.dtype, schedule=schedule)
