"""The routed FFN of a base by experts: loops over tiles of slots that share one expert, in pure XLA.

A tile reads its expert's three kernels from the stack of all layers (`tiles.InStack`) and does everything with them:
the hidden state, the low-rank changes of gate and up, the product with the gate's weight. `[T, K, F]` is never in
memory; the backward forms each tile's hidden state again. The kernels are frozen: they get no gradient.

T tokens, D width, F FFN width, E experts, K slots, R rank.
"""

import functools

import jax
import jax.numpy as jnp

from kernels_pallas import tiles
from kernels_pallas.moe_ffn import gates as gating
from kernels_pallas.zeros import gated, masked

F32 = jnp.float32
NN, NT, TN = ((1,), (0,)), ((1,), (1,)), ((0,), (0,))


def _dot(a, b, contract):
    return jax.lax.dot_general(a, b.astype(a.dtype), (contract, ((), ())), preferred_element_type=F32)


def _rows(x, i, valid):
    return jnp.where(valid, tiles.take(x, i), 0)


def _flat(z):
    return z.reshape(z.shape[0] * z.shape[1], -1)


def _own(A, e):
    """The expert's place in a factor that all experts may share."""
    return jnp.minimum(e, A.shape[0] - 1)


class _Tile:
    """What one tile's forward pass forms; the backward needs all of it."""

    def __init__(self, activation, s, x, kernels, low, mask):
        dtype = x.dtype
        self.x = _rows(x, s.token, s.valid)
        self.W = [tiles.expert(W, s.expert) for W in kernels[:3]]
        self.b = [tiles.expert(b, s.expert).astype(F32) for b in kernels[3:]]
        g, u = (_dot(self.x, W, NN) for W in self.W[:2])
        if self.b:
            g, u = g + self.b[0], u + self.b[1]
        if low is not None:
            self.z = [_rows(_flat(z), s.slot, s.valid).astype(dtype) for z in low[:2]]
            self.B = [tiles.expert(B, _own(B, s.expert)) for B in low[2:]]
            g, u = g + _dot(self.z[0], self.B[0], NN), u + _dot(self.z[1], self.B[1], NN)
        (self.a, self.da), (self.u, self.du) = gating.gate(activation, g), gating.linear(activation, u)
        self.h = self.a * self.u
        self.mask = None if mask is None else tiles.take(mask, s.token)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _op(activation, x, gates, low, kernels, mask, schedule):
    return _forward(activation, x, gates, low, kernels, mask, schedule)[0]


def _forward(activation, x, gates, low, kernels, mask, schedule):
    kept = None if low is None else (*low[:2], *(tiles.kept(B) for B in low[2:]))
    saved = x, gates, kept, [tiles.kept(W) for W in kernels], mask, schedule
    return tiles.one_by_one(functools.partial(_value, activation), *saved), saved


@jax.named_scope("base_experts")
def _value(activation, x, gates, low, kernels, mask, schedule):
    T, K = gates.shape

    def step(i, carry):
        s = tiles.step(schedule, i)
        tile = _Tile(activation, s, x, kernels, low, mask)
        w = _rows(_flat(gates[..., None]), s.slot, s.valid)
        out = _dot(tile.h.astype(x.dtype), tile.W[2], NN)
        y = tiles.add_rows(carry[0], s.to_token, gated(w, out + tile.b[2] if tile.b else out))
        if low is None:
            return (y,)
        z = _dot(masked(tile.h, tile.mask).astype(x.dtype), tile.B[2], NT)
        return y, tiles.add_rows(carry[1], s.to_slot, z)

    shapes = [x.shape] if low is None else [x.shape, (T * K, low[0].shape[-1])]
    out = tiles.loop(schedule.count, step, tuple(tiles.zeros(*shapes)))
    z_d = None if low is None else out[1].reshape(T, K, -1).astype(x.dtype)
    return out[0].astype(x.dtype), z_d


def _backward(activation, saved, cotangents):
    return tiles.one_by_one(functools.partial(_gradients, activation), *saved, *cotangents)


@jax.named_scope("base_experts")
def _gradients(activation, x, gates, low, kernels, mask, schedule, dy, dz_d):
    (T, K), dtype = gates.shape, x.dtype

    def step(i, carry):
        s = tiles.step(schedule, i)
        tile = _Tile(activation, s, x, kernels, low, mask)
        w = _rows(_flat(gates[..., None]), s.slot, s.valid)
        rows = _rows(dy, s.token, s.valid)
        back = _dot(rows, tile.W[2], NT)  # of h, before the gate
        dw = jnp.sum(back * tile.h, axis=1)
        dw = dw + rows.astype(F32) @ tile.b[2] if tile.b else dw
        dw = tiles.add_rows(carry[1], s.to_slot, dw)
        dh = gated(w, back)
        if low is not None:
            dz = _rows(_flat(dz_d), s.slot, s.valid).astype(dtype)
            dh = dh + masked(_dot(dz, tile.B[2], NN), tile.mask)
        dg, du = (dh * tile.da * tile.u).astype(dtype), dh * tile.a
        du = (du if tile.du is None else du * tile.du).astype(dtype)
        dx = tiles.add_rows(carry[0], s.to_token, _dot(dg, tile.W[0], NT) + _dot(du, tile.W[1], NT))
        if low is None:
            return dx, dw
        _, _, dz_g, dz_u, dB_g, dB_u, dA = carry
        dz_g = tiles.add_rows(dz_g, s.to_slot, _dot(dg, tile.B[0], NT))
        dz_u = tiles.add_rows(dz_u, s.to_slot, _dot(du, tile.B[1], NT))
        add = lambda total, d: tiles.add_at(total, _own(total, s.expert), d)  # noqa: E731
        dB_g, dB_u = add(dB_g, _dot(tile.z[0], dg, TN)), add(dB_u, _dot(tile.z[1], du, TN))
        dA = add(dA, _dot(dz, masked(tile.h, tile.mask).astype(dtype), TN))
        return dx, dw, dz_g, dz_u, dB_g, dB_u, dA

    shapes = [x.shape, (T * K,)]
    if low is not None:
        shapes += [(T * K, low[0].shape[-1])] * 2 + [B.shape for B in low[2:]]
    out = tiles.loop(schedule.count, step, tuple(tiles.zeros(*shapes)))
    dx, dgates, dlow = out[0].astype(dtype), out[1].reshape(T, K).astype(gates.dtype), None
    if low is not None:
        dz = [d.reshape(T, K, -1).astype(z.dtype) for d, z in zip(out[2:4], low[:2], strict=True)]
        dlow = (*dz, *(tiles.gradient(B, d) for B, d in zip(low[2:], out[4:], strict=True)))
    return dx, dgates, dlow, None, None, None


_op.defvjp(_forward, _backward)


def moe_ffn(x, gate, up, down, low, idx, gates, *, activation="silu", mask=None, bias=None, rows=None):
    schedule = tiles.plan(idx, gate.shape[0], rows)
    frozen = jax.lax.stop_gradient((gate, up, down, *(bias or ())))
    return _op(activation, x, gates, low, list(frozen), mask, schedule)
