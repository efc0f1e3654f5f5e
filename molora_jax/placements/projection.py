"""A mixture inside one projection (MoLA, LoRAMoE, SMoRA ...): linear in the experts, so gated in rank space.

    y = W x (1 + sum_e g_e (f_e - 1)) + s sum_e g_e B_e A_e x          f_e: a row factor (DoRA, (IA)3), else absent

Several rules on one projection add their changes. Where tokens travel, x goes (or A x in rank space), the change of y
comes back and the frozen product stays at home. T tokens, D width, E experts, K slots, R rank.
"""

import dataclasses
from typing import ClassVar

import flax.struct
import jax.numpy as jnp

from molora_jax.adapters.base import Adapter
from molora_jax.core import lowrank
from molora_jax.core import routing as routing_math
from molora_jax.core.types import Array, Context, Factors
from molora_jax.placements.base import Axes, Part, Placement, Region, replicated


@dataclasses.dataclass(frozen=True)
class Linear(Region):
    """A frozen projection: `x [T, D_in]`, `W [D_in, D_out]`, maybe `bias`, and a `rest [T, D_out]` to add."""

    site: str

    @property
    def inner(self):
        return Axes(("in",), self.site)

    def axes(self):
        return {
            "x": Axes(("tokens", "in"), self.site), "W": Axes(("in", "out"), self.site),
            "bias": Axes(("out",), self.site), "rest": Axes(("sum", "tokens", None)),
        }  # fmt: skip

    def outs(self):
        return Axes(("tokens", "out"), self.site)

    def start(self, arrays, parts, at):
        x = scaled = arrays["x"]
        for part in parts:
            change = part.scales(x)
            scaled = scaled if change is None else scaled + change
        y = lowrank.frozen_linear(arrays["W"], scaled)
        return arrays | {"base": y}, y

    def close(self, arrays, y, parts):
        return y + arrays["rest"] if "rest" in arrays else y

    def end(self, arrays, y):
        return y + arrays["bias"].astype(y.dtype) if "bias" in arrays else y


@flax.struct.dataclass
class ProjectionPart(Part):
    """One rule's experts in one projection: `factors` with the scale set, `gates [T, E]`, its dropout.

    `slots` are `(idx [T, K], gates [T, K])`, None without a router.
    """

    factors: Factors
    gates: Array
    slots: tuple[Array, Array] | None
    dropout: lowrank.Dropout | None
    latent: object = flax.struct.field(pytree_node=False)
    experts: int = flax.struct.field(pytree_node=False)
    site: str = flax.struct.field(pytree_node=False)
    placement: Placement = flax.struct.field(pytree_node=False)

    @property
    def routed(self) -> bool:
        return self.slots is not None

    @property
    def decision(self):
        return self.slots

    def axes(self, rank_space):
        tokens = Axes(("tokens", None))
        return self.replace(
            factors=self.placement.axes(self.factors, self.site, rank_space), gates=tokens,
            slots=None if self.slots is None else (tokens, tokens), dropout=replicated(self.dropout),
        )  # fmt: skip

    def scales(self, x):
        inp = self.factors.inp
        return None if inp is None else (x * lowrank.combine(inp, self.gates)).astype(x.dtype)

    def here(self, arrays, y, at, early=None):
        if self.factors.out is not None:
            base = arrays["base"]
            if self.factors.with_bias and "bias" in arrays:  # once in the sum over the shards of the inner width
                base = base + (arrays["bias"] / at.shard[1]).astype(base.dtype)
            y = y + (base * lowrank.combine(self.factors.out, self.gates)).astype(y.dtype)
        slots = self.slots if self.routed and self.slots[0].shape[1] < self.experts else None
        return y + self.change(arrays, at, slots)

    def change(self, arrays, at, slots):
        """The low-rank part, `[T, D_out]`."""
        seen = lowrank.dropped(arrays["x"], self.dropout, at.rows, at.shard)
        return lowrank.low_rank(seen, self.factors, self.gates, self.latent, slots)

    def sends(self, arrays, at, rank_space):
        x = lowrank.dropped(arrays["x"], self.dropout, at.rows, at.shard)
        if not rank_space:
            return x
        A = self.factors.A
        z = jnp.dot(x, A.reshape(-1, A.shape[-1]).T.astype(x.dtype), preferred_element_type=jnp.float32)
        return lowrank.to_slots(z.reshape(len(x), *A.shape[:2]), self.slots[0]).astype(x.dtype)

    def there(self, arrays, rows, shard):
        factors, (x, expert, gates, *_) = self.factors, rows
        weight = jnp.where(expert[:, None] == jnp.arange(factors.B.shape[0]), gates[:, None], 0.0)
        if not rows.rank:
            return lowrank.low_rank(x, factors, weight, self.latent, (expert[:, None], gates[:, None]))
        z = x[:, None].astype(jnp.float32)
        z = z if self.latent is None else self.latent(z)
        if factors.mid is not None:
            z = jnp.einsum("ter,eqr->teq", jnp.broadcast_to(z, (len(z), *factors.mid.shape[:2])), factors.mid)
        return lowrank.expand(z, factors.B, factors.scale * weight, x.dtype)

    def stay(self, arrays, y, back, lost):
        return y + back


def latent_of(adapter, p, ctx):
    """The adapter's `latent` hook as a function of z alone, None where it is the identity."""
    if type(adapter).latent is Adapter.latent:
        return None
    return lambda z: adapter.latent(z, p, ctx)


@dataclasses.dataclass(frozen=True)
class Projection(Placement):
    NAME: ClassVar[str] = "projection"
    KEPT: ClassVar[tuple[str, ...]] = ("A", "A0")

    def widths(self, config, meeting):
        d_in, d_out = config.dims(meeting)
        return (d_in, "in"), (d_out, "out")

    def ends(self, rule, meeting):
        return meeting in ("down", "out_proj")

    def stays(self, factors):
        if factors.out is not None or factors.inp is not None:
            return "its row or column factors multiply the frozen product, which stays at home while the experts do not"
        return super().stays(factors)

    def part(self, rule, site, p, shared, routing, context, x):
        return part(rule, p.get(site, {}), shared, routing, context(site), x, placement=self)


def part(
    rule, p: dict, shared: dict, routing, ctx: Context, x: Array, *, placement=Projection(), kind=ProjectionPart
) -> ProjectionPart:
    """`x [T, D_in]` only gives the shape; without a router every token uses the one expert with weight 1."""
    adapter = rule.adapter
    factors = lowrank.located(adapter.factors(p, shared, ctx), p, ctx.stack).replace(scale=adapter.scale())
    E = factors.B.shape[0]
    gates = jnp.ones((len(x), 1), jnp.float32) if routing is None else routing.gates.reshape(-1, E)
    slots = None if routing is None else routing_math.slots(routing)
    dropout = lowrank.dropout(ctx.keyed(), adapter.dropout)
    site = "" if ctx.site is None else ctx.site.name
    return kind(factors, gates, slots, dropout, latent_of(adapter, p, ctx), E, site, placement)
