"""The routed FFN by experts: a loop over tiles of slots that share one expert, in pure XLA.

    dg = z_g B_g[e],  du = z_u B_u[e],  h = act(g + dg) * (u + du),  mix += w h,  z_d = A_d[e] (mask h)

Cost grows with the slots in use and not with E; nothing is dropped. Everything F-wide of a slot lives for one tile and
stays in the cache: no `[T, K, F]`, forward or backward, which forms h again. One transcendental a slot and pass.
A tile's empty rows may read anything, NaN included: `where`, never a product by zero. A base_gate of 0 keeps h_0 out
even where it is not finite; its own dbase_gate is then 0.

T tokens, F FFN width, E experts, K slots, R rank, M rows of a tile.
"""

import functools

import jax
import jax.numpy as jnp

from kernels_pallas import tiles
from kernels_pallas.routed_ffn.activations import core, pair
from kernels_pallas.zeros import gated, masked

F32 = jnp.float32


def _dot(a, b, contract):
    return jax.lax.dot_general(a, b, (contract, ((), ())), preferred_element_type=F32)


NN, NT, TN = ((1,), (0,)), ((1,), (1,)), ((0,), (0,))


def _rows(x, slot, valid):
    """Rows of `[T, K, ...]` by slot, zero where the tile has none."""
    return jnp.where(valid, tiles.take(x.reshape(x.shape[0] * x.shape[1], -1), slot), 0)


def _expert(A, e):
    return tiles.expert(A, e if A.shape[0] > 1 else 0)


def _hidden(activation, g, u, z_g, z_u, B_g, B_u, token):
    """`g_k`, `core(g_k)`, `u_k [M, F]` of one tile, float32."""
    g_k = tiles.take(g, token).astype(F32) + _dot(z_g, B_g, NN)
    u_k = tiles.take(u, token).astype(F32) + _dot(z_u, B_u, NN)
    return g_k, core(activation, g_k), u_k


# XLA:CPU forms a value again in every loop that reads it. Where several do, it is cheaper written once (measured: 13 %
# of the forward, 11 % of the whole); where one does, it is dearer.
_once = jax.lax.optimization_barrier


def _base_rows(function, outs, g, u, base_gate, *more):
    """`function(g, u, base_gate, *more)`, what h_0 adds to so many `[T, F]` arrays; of a bool one's rows alone."""
    if base_gate.dtype != bool:
        return function(g, u, base_gate, *more)
    return tiles.rows_where(base_gate, function, (g, u, base_gate, *more), tuple(tiles.zeros(*[g.shape] * outs)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _op(activation, g, u, z_g, z_u, B_g, B_u, A_d, gates, base_gate, mask, schedule):
    return _forward(activation, g, u, z_g, z_u, B_g, B_u, A_d, gates, base_gate, mask, schedule)[0]


def _forward(activation, g, u, z_g, z_u, B_g, B_u, A_d, gates, base_gate, mask, schedule):
    saved = (g, u, z_g, z_u, *map(tiles.kept, (B_g, B_u, A_d)), gates, base_gate, mask, schedule)
    return tiles.one_by_one(functools.partial(_value, activation), *saved), saved


@jax.named_scope("experts")
def _value(activation, g, u, z_g, z_u, B_g, B_u, A_d, gates, base_gate, mask, schedule):
    T, K, R = z_g.shape
    dtype = g.dtype

    def step(i, carry):
        mix, z_d = carry
        e, slot, token, to_slot, to_token, valid, _ = tiles.step(schedule, i)
        z = (_rows(z_g, slot, valid).astype(dtype), _rows(z_u, slot, valid).astype(dtype))
        g_k, c, u_k = _hidden(activation, g, u, *z, _expert(B_g, e).astype(dtype), _expert(B_u, e).astype(dtype), token)
        h = _once(pair(activation, g_k, c)[0] * u_k)
        w = _rows(gates, slot, valid)
        seen = masked(h, None if mask is None else tiles.take(mask, token)).astype(dtype)
        down = _dot(seen, _expert(A_d, e).astype(dtype), NT)
        mix = tiles.add_rows(mix, to_token, gated(w, h))
        return mix, tiles.add_rows(z_d, to_slot, down)

    def h_0(g, u, base_gate):
        g = g.astype(F32)
        return (gated(base_gate[:, None], pair(activation, g, core(activation, g))[0] * u.astype(F32)),)

    (start,) = _base_rows(h_0, 1, g, u, base_gate)
    mix, z_d = tiles.loop(schedule.count, step, (start, *tiles.zeros((T * K, R))))
    return mix.astype(dtype), z_d.reshape(T, K, R).astype(dtype)


def _backward(activation, saved, cotangents):
    return tiles.one_by_one(functools.partial(_gradients, activation), *saved, *cotangents)


@jax.named_scope("experts")
def _gradients(activation, g, u, z_g, z_u, B_g, B_u, A_d, gates, base_gate, mask, schedule, dmix, dz_d):
    (T, K, R), dtype = z_g.shape, g.dtype

    def step(i, carry):
        dg, du, dz_g, dz_u, dgates, dB_g, dB_u, dA_d = carry
        e, slot, token, to_slot, to_token, valid, _ = tiles.step(schedule, i)
        zg, zu, dz = (_rows(z, slot, valid).astype(dtype) for z in (z_g, z_u, dz_d))
        Bg, Bu, Ad = (_expert(x, e).astype(dtype) for x in (B_g, B_u, A_d))
        g_k, c, u_k = _once(_hidden(activation, g, u, zg, zu, Bg, Bu, token))
        w = _rows(gates, slot, valid)
        dm = tiles.take(dmix, token).astype(F32)
        kept = None if mask is None else tiles.take(mask, token)
        dh = _once(gated(w, dm) + masked(_dot(dz, Ad, NN), kept))
        a, da = pair(activation, g_k, c)
        h = _once(jnp.where(valid, a * u_k, 0.0))
        dg_k, du_k = _once((jnp.where(valid, dh * da * u_k, 0.0), jnp.where(valid, dh * a, 0.0)))
        seen = masked(h, kept).astype(dtype)
        dw = jnp.sum(dm * h, axis=1)
        dg, du = tiles.add_rows(dg, to_token, dg_k), tiles.add_rows(du, to_token, du_k)
        dg_k, du_k = dg_k.astype(dtype), du_k.astype(dtype)
        return (
            dg,
            du,
            tiles.add_rows(dz_g, to_slot, _dot(dg_k, Bg, NT)),
            tiles.add_rows(dz_u, to_slot, _dot(du_k, Bu, NT)),
            tiles.add_rows(dgates, to_slot, dw),
            tiles.add_at(dB_g, e, _dot(zg, dg_k, TN)),
            tiles.add_at(dB_u, e, _dot(zu, du_k, TN)),
            tiles.add_at(dA_d, e if A_d.shape[0] > 1 else 0, _dot(dz, seen, TN)),
        )

    def h_0(g, u, base_gate, dmix):
        g, u, dmix = g.astype(F32), u.astype(F32), dmix.astype(F32)
        a, da = pair(activation, g, _once(core(activation, g)))
        d = gated(base_gate[:, None], dmix * da * u), gated(base_gate[:, None], dmix * a)
        if base_gate.dtype == bool:
            return d
        dbase_gate = jax.lax.dot_general(dmix, a * u, (((1,), (1,)), ((0,), (0,))))
        return *d, jnp.where((base_gate != 0) | jnp.isfinite(dbase_gate), dbase_gate, 0.0).astype(base_gate.dtype)

    dg0, du0, *dbase_gate = _base_rows(h_0, 2, g, u, base_gate, dmix)
    sums = tiles.zeros((T * K, R), (T * K, R), (T * K,), B_g.shape, B_u.shape, A_d.shape)
    dg, du, dz_g, dz_u, dgates, dB_g, dB_u, dA_d = tiles.loop(schedule.count, step, (dg0, du0, *sums))
    return (
        dg.astype(dtype),
        du.astype(dtype),
        dz_g.reshape(z_g.shape).astype(z_g.dtype),
        dz_u.reshape(z_u.shape).astype(z_u.dtype),
        tiles.gradient(B_g, dB_g),
        tiles.gradient(B_u, dB_u),
        tiles.gradient(A_d, dA_d),
        dgates.reshape(gates.shape).astype(gates.dtype),
        *(dbase_gate or (None,)),
        None,
        None,
    )


_op.defvjp(_forward, _backward)


def routed_ffn(g, u, z_g, z_u, B_g, B_u, A_d, idx, gates, base_gate, *, activation="silu", mask=None, rows=None):
    """Shapes as in `api.routed_ffn`; `rows` of a tile, by default from the experts' load."""
    schedule = tiles.plan(idx, B_g.shape[0], rows)
    return _op(activation, g, u, z_g, z_u, B_g, B_u, A_d, gates, base_gate, mask, schedule)
