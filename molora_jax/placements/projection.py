"""A mixture inside one projection (MoLA, LoRAMoE, SMoRA ...): linear in the experts, so gated in rank space.

    y = W x (1 + sum_e g_e (f_e - 1)) + s sum_e g_e B_e A_e x          f_e: DoRA's row factor, absent otherwise

Several rules on one projection add their changes. T tokens, D width, E experts.
"""

import dataclasses
from typing import ClassVar

import flax.struct
import jax.numpy as jnp

from molora_jax.adapters.base import Adapter
from molora_jax.core import lowrank
from molora_jax.core import routing as routing_math
from molora_jax.core.types import Array, Context, Factors
from molora_jax.placements.base import Placement


@flax.struct.dataclass
class Part:
    """One rule's share in one projection: `factors` with the scale set, `gates [T, E]`, its dropout.

    `slots` are `(idx [T, K], gates [T, K])`, None without a router; `shared_A`: all experts have one A.
    """

    factors: Factors
    gates: Array
    slots: tuple[Array, Array] | None
    dropout: lowrank.Dropout | None
    latent: object = flax.struct.field(pytree_node=False)
    experts: int = flax.struct.field(pytree_node=False)
    shared_A: bool = flax.struct.field(pytree_node=False)

    @property
    def routed(self) -> bool:
        return self.slots is not None


def part(rule, p: dict, shared: dict, routing, ctx: Context, x: Array) -> Part:
    """`x [T, D_in]` only gives the shape; without a router every token uses the one expert with weight 1."""
    adapter = rule.adapter
    factors = lowrank.located(adapter.factors(p, shared, ctx), p, ctx.stack).replace(scale=adapter.scale())
    E = factors.B.shape[0]
    gates = jnp.ones((len(x), 1), jnp.float32) if routing is None else routing.gates.reshape(-1, E)
    slots = None if routing is None else routing_math.slots(routing)
    dropout = lowrank.dropout(ctx.keyed(), adapter.dropout)
    shared_A = factors.A.shape[0] == 1 < E
    return Part(factors, gates, slots, dropout, latent_of(adapter, p, ctx), E, shared_A)


def latent_of(adapter, p, ctx):
    """The adapter's `latent` hook as a function of z alone, None where it is the identity."""
    if type(adapter).latent is Adapter.latent:
        return None
    return lambda z: adapter.latent(z, p, ctx)


def project(W: Array, x: Array, parts: list[Part], rows: Array, share=(0, 1)) -> Array:
    """`x [T, D_in]`, `W [D_in, D_out]` -> `[T, D_out]`: the frozen projection and every rule's change of it.

    `rows [T]`: the tokens' place in the global batch (for dropout). Linear in the columns of x: where x, W's rows and
    A hold one `share` of D_in, the sum over the shares is the projection.
    """
    scaled = x
    for one in parts:
        if one.factors.inp is not None:
            scaled = scaled + (x * lowrank.combine(one.factors.inp, one.gates)).astype(x.dtype)
    base = y = lowrank.frozen_linear(W, scaled)
    for one in parts:
        if one.factors.out is not None:
            y = y + (base * lowrank.combine(one.factors.out, one.gates)).astype(y.dtype)
        seen = lowrank.dropped(x, one.dropout, rows, share)
        slots = one.slots if one.slots is not None and one.slots[0].shape[1] < one.experts else None
        y = y + lowrank.low_rank(seen, one.factors, one.gates, one.latent, slots)
    return y


@dataclasses.dataclass(frozen=True)
class Projection(Placement):
    NAME: ClassVar[str] = "projection"
    KEPT: ClassVar[tuple[str, ...]] = ("A", "A0")

    def stays(self, factors):
        if factors.out is not None or factors.inp is not None:
            return "its row or column factors multiply the frozen product, which stays at home while the experts do not"
        return None
