"""The routed FFN in plain products of all rows, one slot at a time: never `[T, K, F]` in memory.

A slot's `dg_k = z_g[k] B_g[e_k]` is one product of width E*R with the other experts' columns at zero, so the cost of
the rank-R products grows with E; the element-wise work does not. Where every expert has a slot (K == E) the slots are
put in the experts' order first, and a product has width R (so a token must not name an expert twice). The backward
forms each h_k again. A base_gate of 0 keeps h_0 out even where it is not finite; its own dbase_gate is then 0.

T tokens, F FFN width, E experts, K slots, R rank.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.routed_ffn.activations import core, pair
from kernels_pallas.zeros import gated, masked

F32 = jnp.float32


class _Slot(NamedTuple):
    """One term of the mixture. `hot [T, K, E']` marks where `[T, K, R]` goes in the `[T, E' * R]` that meets B."""

    hot: jax.Array
    experts: slice

    def spread(self, z):
        """`[T, K, R]` -> `[T, E' * R]`, zero in the columns of other experts."""
        z = jnp.sum(jnp.where(self.hot[..., None], z[:, :, None, :], 0), axis=1)
        return z.reshape(len(z), -1)

    def collect(self, wide):
        """`[T, E' * R]` -> `[T, K, R]`, zero in other slots and where the slot is not used."""
        wide = wide.reshape(len(wide), 1, self.hot.shape[-1], -1)
        return jnp.sum(jnp.where(self.hot[..., None], wide, 0), axis=2)

    def flat(self, B, dtype):
        return B[self.experts].reshape(-1, B.shape[-1]).astype(dtype)

    @property
    def used(self):
        return jnp.any(self.hot, axis=(1, 2))


def _slots(idx, E) -> list[_Slot]:
    hot = idx[:, :, None] == jnp.arange(E)
    K = idx.shape[1]
    if K == E:  # a token names an expert at most once
        return [_Slot(hot[:, :, e : e + 1], slice(e, e + 1)) for e in range(E)]
    return [_Slot(hot & (jnp.arange(K) == k)[:, None], slice(0, E)) for k in range(K)]


def _dot(a, b, contract):
    return jax.lax.dot_general(a, b, (contract, ((), ())), preferred_element_type=F32)


NN, NT, TN = ((1,), (0,)), ((1,), (1,)), ((0,), (0,))


def _activate(activation, g):
    g = g.astype(F32)
    return pair(activation, g, jax.lax.optimization_barrier(core(activation, g)))


def _hidden(activation, g, u, z_g, z_u, B_g, B_u):
    """`a = act(g_k)`, its derivative, `u_k` of one slot, float32; `h_k = a * u_k`."""
    g_k = g.astype(F32) + _dot(z_g, B_g, NN)
    u_k = u.astype(F32) + _dot(z_u, B_u, NN)
    return *_activate(activation, g_k), u_k


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _op(activation, g, u, z_g, z_u, B_g, B_u, A_d, idx, gates, base_gate, mask):
    return _forward(activation, g, u, z_g, z_u, B_g, B_u, A_d, idx, gates, base_gate, mask)[0]


@jax.named_scope("experts")
def _forward(activation, g, u, z_g, z_u, B_g, B_u, A_d, idx, gates, base_gate, mask):
    E, dtype = B_g.shape[0], g.dtype
    A_all = jnp.broadcast_to(A_d, (E, *A_d.shape[1:]))
    mix = gated(base_gate[:, None], _activate(activation, g)[0] * u.astype(F32))
    z_d = 0.0
    for slot in _slots(idx, E):
        zg, zu = slot.spread(z_g).astype(dtype), slot.spread(z_u).astype(dtype)
        a, _, u_k = _hidden(activation, g, u, zg, zu, slot.flat(B_g, dtype), slot.flat(B_u, dtype))
        h = a * u_k
        w = jnp.sum(jnp.where(jnp.any(slot.hot, -1), gates, 0.0), axis=1)[:, None]
        mix = mix + gated(w, h)
        z_d = z_d + slot.collect(_dot(masked(h, mask).astype(dtype), slot.flat(A_all, dtype), NT))
    out = mix.astype(dtype), z_d.astype(dtype)
    return out, (g, u, z_g, z_u, B_g, B_u, A_d, idx, gates, base_gate, mask)


@jax.named_scope("experts")
def _backward(activation, saved, cotangents):
    g, u, z_g, z_u, B_g, B_u, A_d, idx, gates, base_gate, mask = saved
    dmix, dz_d = cotangents
    E, dtype = B_g.shape[0], g.dtype
    A_all = jnp.broadcast_to(A_d, (E, *A_d.shape[1:]))
    dmix32, u32 = dmix.astype(F32), u.astype(F32)
    a, da = _activate(activation, g)
    dbase_gate = None
    if base_gate.dtype != bool:
        dbase_gate = jnp.sum(dmix32 * a * u32, axis=-1)
        dbase_gate = jnp.where((base_gate != 0) | jnp.isfinite(dbase_gate), dbase_gate, 0.0).astype(base_gate.dtype)
    dg, du = gated(base_gate[:, None], dmix32 * da * u32), gated(base_gate[:, None], dmix32 * a)
    dz_g, dz_u, dgates = jnp.zeros(z_g.shape, F32), jnp.zeros(z_u.shape, F32), jnp.zeros(gates.shape, F32)
    dB_g, dB_u, dA = jnp.zeros(B_g.shape, F32), jnp.zeros(B_u.shape, F32), jnp.zeros(A_all.shape, F32)
    for slot in _slots(idx, E):
        zg, zu, dz = (slot.spread(z).astype(dtype) for z in (z_g, z_u, dz_d))
        Bg, Bu, Ad = (slot.flat(x, dtype) for x in (B_g, B_u, A_all))
        a, da, u_k = _hidden(activation, g, u, zg, zu, Bg, Bu)
        mine, used = jnp.any(slot.hot, -1), slot.used[:, None]
        # a padded slot's h is the base's, so its part must not reach g, u or a factor
        h = jnp.where(used, a * u_k, 0.0)
        w = jnp.sum(jnp.where(mine, gates, 0.0), axis=1)[:, None]
        dgates = dgates + jnp.where(mine, jnp.sum(dmix32 * h, axis=-1)[:, None], 0.0)
        dh = gated(w, dmix32) + masked(_dot(dz, Ad, NN), mask)
        dg_k = jnp.where(used, dh * da * u_k, 0.0)
        du_k = jnp.where(used, dh * a, 0.0)
        dg, du = dg + dg_k, du + du_k
        dg_k, du_k, seen = dg_k.astype(dtype), du_k.astype(dtype), masked(h, mask).astype(dtype)
        dz_g = dz_g + slot.collect(_dot(dg_k, Bg, NT))
        dz_u = dz_u + slot.collect(_dot(du_k, Bu, NT))
        shape = (-1, *B_g.shape[1:])
        dB_g = dB_g.at[slot.experts].add(_dot(zg, dg_k, TN).reshape(shape))
        dB_u = dB_u.at[slot.experts].add(_dot(zu, du_k, TN).reshape(shape))
        dA = dA.at[slot.experts].add(_dot(dz, seen, TN).reshape(shape))
    if A_d.shape[0] != E:
        dA = jnp.sum(dA, axis=0, keepdims=True)
    return (
        dg.astype(dtype),
        du.astype(dtype),
        dz_g.astype(z_g.dtype),
        dz_u.astype(z_u.dtype),
        dB_g.astype(B_g.dtype),
        dB_u.astype(B_u.dtype),
        dA.astype(A_d.dtype),
        None,
        dgates.astype(gates.dtype),
        dbase_gate,
        None,
    )


_op.defvjp(_forward, _backward)


def routed_ffn(g, u, z_g, z_u, B_g, B_u, A_d, idx, gates, base_gate, *, activation="silu", mask=None):
    return _op(activation, g, u, z_g, z_u, B_g, B_u, A_d, idx, gates, base_gate, mask)
