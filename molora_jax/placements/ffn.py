"""Experts that are the whole feed-forward block over one frozen set of weights (MixLoRA, LLaVA-MoLE ...).

    h_k = act(W_g x + dg_k) * (W_u x + du_k),     y = W_d [c h_0 + sum_k w_k h_k] + s sum_k w_k B_d A_d h_k

The frozen W_d is linear, so it is applied once, to the mixed h: a routed FFN needs no base FLOPs beyond the dense one.
`c` is `Routing.base`, by default `1 - sum w`, so that untrained experts (B = 0) give the base whatever the gates sum
to; the rule's `shrink=True` sets c = 0 where a token has an expert and lets `sum w` shrink the base (MixLoRA-dynamic).

`down="per_expert"` applies W_d to every expert's own h: for row factors that sit after W_d (DoRA).
T tokens, D width, F FFN width, E experts, K slots, R rank.
"""

import dataclasses
from typing import ClassVar

import flax.struct
import jax
import jax.numpy as jnp

from kernels_pallas import routed_ffn
from kernels_pallas.routed_ffn.reference import ACTIVATIONS
from molora_jax.core import lowrank
from molora_jax.core import routing as routing_math
from molora_jax.core.types import Array, Factors
from molora_jax.placements.base import Placement
from molora_jax.placements.projection import latent_of

SITES = ("gate", "up", "down")


@flax.struct.dataclass
class Part:
    """One rule's experts: factors (with the scale set) and dropout by site, `idx, gates [T, K]`, `base [T]`."""

    factors: dict[str, Factors]
    dropout: dict[str, lowrank.Dropout | None]
    idx: Array
    gates: Array
    base: Array
    routed: bool = flax.struct.field(pytree_node=False)
    per_expert: bool = flax.struct.field(pytree_node=False)
    latents: tuple = flax.struct.field(pytree_node=False)
    experts: int = flax.struct.field(pytree_node=False)
    shared_A: bool = flax.struct.field(pytree_node=False)

    def latent(self, site: str):
        return self.latents[SITES.index(site)]


def part(rule, p: dict, shared: dict, routing, contexts: dict, x: Array) -> Part:
    """`contexts` by site; `x [T, D]` only gives the shape. Without a router: one expert with weight 1."""
    adapter, T = rule.adapter, len(x)
    factors, dropout, latents = {}, {}, []
    for site in SITES:
        ctx = contexts[site]
        own = p.get(site, {})
        known = lowrank.located(adapter.factors(own, shared, ctx), own, ctx.stack)
        factors[site] = known.replace(scale=adapter.scale())
        dropout[site] = lowrank.dropout(ctx.keyed(), adapter.dropout)
        latents.append(latent_of(adapter, own, ctx))
    if routing is None:
        idx, gates, base = jnp.zeros((T, 1), jnp.int32), jnp.ones((T, 1), jnp.float32), jnp.zeros(T, bool)
    else:
        idx, gates = routing_math.slots(routing)
        if routing.base is not None:
            base = routing.base.reshape(-1)
        elif rule.shrink:  # a token without any expert (padding is one) keeps the base's
            base = ~jnp.any(routing.selected, axis=-1).reshape(-1)
        else:
            base = 1.0 - jnp.sum(gates, axis=-1)
    # one expert's W_d is applied once either way, but a row factor has to act after it
    per_expert = rule.down == "per_expert" or (routing is None and factors["down"].out is not None)
    E = factors["gate"].B.shape[0]
    return Part(
        factors, dropout, idx, gates, base,
        routed=routing is not None, per_expert=per_expert, latents=tuple(latents),
        experts=E, shared_A=factors["gate"].A.shape[0] == 1 < E,
    )  # fmt: skip


def ranks(x: Array, one: Part, rows: Array) -> dict[str, Array]:
    """Scaled rank activations `[T, K, R]` of gate and up at the token's experts, from `x [T, D]`."""
    z = {}
    for site in ("gate", "up"):
        seen = lowrank.dropped(x, one.dropout[site], rows)
        factors = one.factors[site]
        z[site] = (factors.scale * lowrank.shrink_slots(seen, factors, one.idx, one.latent(site))).astype(x.dtype)
    return z


def hidden(z: dict, g: Array, u: Array, one: Part, activation: str, rows: Array, share) -> tuple[Array, Array]:
    """The mixed hidden state and the rank activations of the low-rank down path.

    `z` from `ranks`, `g, u [T, F]` shared projections -> `mix [T, F] = c h_0 + sum w_k h_k`, `z_d [T, K, R]`.
    """
    B_g, B_u, A_d = (one.factors[site].by_expert(name) for site, name in (("gate", "B"), ("up", "B"), ("down", "A")))
    drop, ways = one.dropout["down"], share[1]
    mask = None if drop is None else drop.mask(rows, g.shape[1] * ways, g.dtype, share=share)
    return routed_ffn(
        g, u, z["gate"], z["up"], B_g, B_u, A_d, one.idx, one.gates, one.base, activation=activation, mask=mask
    )


def low_rank_down(z_d: Array, one: Part, dtype) -> Array:
    """`s sum_k w_k B_d[e_k] z_d[k]`: `[T, D]`."""
    factors, E = one.factors["down"], one.factors["down"].B.shape[0]
    gates = factors.scale * one.gates
    if one.latent("down") is None and factors.mid is None:
        return lowrank.expand_slots(z_d, factors, one.idx, gates, dtype)
    z = lowrank.from_slots(z_d.astype(jnp.float32), one.idx, E)
    if one.latent("down") is not None:
        z = one.latent("down")(z)
    if factors.mid is not None:
        z = jnp.einsum("ter,eqr->teq", z, factors.mid)
    return lowrank.expand(z, factors.B, lowrank.from_slots(gates[..., None], one.idx, E)[..., 0], dtype)


def is_plain(one: Part) -> bool:
    """True where the fused form holds: no row or column factors, W_d applied once."""
    return not one.per_expert and all(f.out is None and f.inp is None for f in one.factors.values())


def per_slot(x: Array, g: Array, u: Array, one: Part, activation: str, down, rows, share) -> tuple[Array, Array]:
    """The general form: every slot's own h, row and column factors included, W_d per slot where asked for.

    `down(h [T, F]) -> [T, D]` applies the frozen W_d. Returns `mix [T, F]` still to be sent through W_d (zero beyond
    `c h_0` with `per_expert`) and the rest of the output `[T, D]`.
    """
    act = ACTIVATIONS[activation]
    E = one.factors["gate"].B.shape[0]
    mix = (one.base[:, None] * (act(g) * u)).astype(x.dtype)
    rest = jnp.zeros(x.shape, jnp.float32)

    @jax.checkpoint  # keeps one slot's [T, F] at a time
    def slot(idx, w):
        hot = (idx[:, None] == jnp.arange(E)).astype(jnp.float32)  # one-hot gates: the slot's expert with weight 1

        def change(site, seen, base):
            f = one.factors[site]
            seen = lowrank.dropped(seen, one.dropout[site], rows, share if site == "down" else (0, 1))
            y = lowrank.low_rank(seen, f, hot, one.latent(site))
            return y if f.out is None else y + (base * lowrank.combine(f.out, hot)).astype(y.dtype)

        def scaled(site, seen):
            f = one.factors[site].inp
            return seen if f is None else seen * (1 + lowrank.combine(f, hot)).astype(seen.dtype)

        if any(one.factors[s].inp is not None for s in ("gate", "up")):
            raise ValueError("column factors (inp) on a routed FFN's gate and up need their own base product")
        h = act(g + change("gate", x, g)) * (u + change("up", x, u))
        h = scaled("down", h)
        w = jnp.where(idx < E, w, 0.0)[:, None]
        if one.per_expert:
            base = down(h)
            return jnp.zeros_like(h), w * (base + change("down", h, base))
        return (w * h).astype(h.dtype), w * change("down", h, 0.0)

    for k in range(one.idx.shape[1]):
        more, out = slot(one.idx[:, k], one.gates[:, k])
        mix, rest = mix + more, rest + out
    return mix, rest.astype(x.dtype)


def apply(x, g, u, parts: list[Part], activation: str, down, rows: Array, share=(0, 1), z=None) -> tuple[Array, Array]:
    """All `ffn` rules of a block together: `sum_rules sum_k w_k (h_k - h_0)` on top of h_0.

    `x [T, D]`, `g, u [T, F]`; `rows [T]` the tokens' place in the global batch (for dropout). Where g, u and the
    factors hold one `share` of F, `rest` is a partial sum, as the frozen W_d's product of `mix` is. `z`: `ranks` of
    every part, where they are known.

    Returns `mix [T, F]` for the block's one frozen W_d, and `rest [T, D]` to add after it.
    """
    mixes, rest = [], jnp.zeros(x.shape, x.dtype)
    for i, one in enumerate(parts):
        if is_plain(one):
            known = ranks(x, one, rows) if z is None else z[i]
            mix, z_d = hidden(known, g, u, one, activation, rows, share)
            more = low_rank_down(z_d, one, x.dtype)
        else:
            mix, more = per_slot(x, g, u, one, activation, down, rows, share)
        mixes.append(mix)
        rest = rest + more
    mix = sum(mixes)
    if len(parts) > 1:  # every rule brought its own c h_0
        mix = mix - (len(parts) - 1) * (ACTIVATIONS[activation](g) * u)
    return mix, rest


@dataclasses.dataclass(frozen=True)
class FFN(Placement):
    NAME: ClassVar[str] = "ffn"
    SITES: ClassVar[tuple[str, ...]] = ("ffn",)
    OWNS: ClassVar[tuple[str, ...] | None] = ("gate", "up", "down")
    REDONE: ClassVar[tuple[str, ...]] = ("gate", "up")
    IDS: ClassVar[int] = 2
    REFUSES: ClassVar[tuple] = (
        (
            "down", (("router.name", "given", True), ("down", "is", "once"), ("adapter.name", "states", "ROW_FACTORS")),
            "'per_expert'",
            "the row factor sits after W_d and differs between experts, so W_d cannot be applied once for all: "
            "set {where}.down to 'per_expert' (W_d is applied K times).",
        ),
    )  # fmt: skip

    def ends(self, rule, meeting):
        return True
