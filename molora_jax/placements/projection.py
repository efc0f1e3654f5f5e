"""A mixture inside one projection (MoLA, LoRAMoE, SMoRA ...): linear in the experts, so gated in rank space.

    y = W x (1 + sum_e g_e (f_e - 1)) + s sum_e g_e B_e A_e x          f_e: DoRA's row factor, absent otherwise

Several rules on one projection add their changes. T tokens, D width, E experts.
"""

import dataclasses

import jax.numpy as jnp

from molora_jax.adapters.base import Adapter
from molora_jax.core import lowrank
from molora_jax.core import routing as routing_math
from molora_jax.core.types import Array, Context, Factors


@dataclasses.dataclass(frozen=True)
class Part:
    """One rule's share in one projection: `factors` with the scale folded in, `gates [T, E]`, dropout's `mask`.

    `slots` is the decision as `(idx, gates) [T, K]`, None where every expert may have a gate.
    """

    factors: Factors
    gates: Array
    mask: Array | None
    latent: object
    slots: tuple[Array, Array] | None = None


def part(rule, p: dict, shared: dict, routing, ctx: Context, x: Array) -> Part:
    """`x [T, D_in]` only gives the shape; without a router every token uses the one expert with weight 1."""
    adapter = rule.adapter
    factors = adapter.factors(p, shared, ctx)
    factors = factors.replace(B=factors.B * adapter.scale())
    E = factors.B.shape[0]
    gates = jnp.ones((len(x), 1), jnp.float32) if routing is None else routing.gates.reshape(-1, E)
    mask = lowrank.dropout_mask(ctx.keyed(), adapter.dropout, x.shape, x.dtype)
    slots = None if routing is None or routing.k_max >= E else routing_math.slots(routing)
    return Part(factors, gates, mask, latent_of(adapter, p, ctx), slots)


def latent_of(adapter, p, ctx):
    """The adapter's `latent` hook as a function of z alone, None where it is the identity."""
    if type(adapter).latent is Adapter.latent:
        return None
    return lambda z: adapter.latent(z, p, ctx)


def project(W: Array, bias: Array | None, x: Array, parts: list[Part]) -> Array:
    """`x [T, D_in]`, `W [D_in, D_out]` -> `[T, D_out]`: the frozen projection and every rule's change of it."""
    scaled = x
    for one in parts:
        if one.factors.inp is not None:
            scaled = scaled + (x * lowrank.combine(one.factors.inp, one.gates)).astype(x.dtype)
    base = y = lowrank.frozen_linear(W, scaled)
    for one in parts:
        if one.factors.out is not None:
            y = y + (base * lowrank.combine(one.factors.out, one.gates)).astype(y.dtype)
        seen = x if one.mask is None else x * one.mask
        y = y + lowrank.low_rank(seen, one.factors, one.gates, one.latent, one.slots)
    return y if bias is None else y + bias.astype(y.dtype)
