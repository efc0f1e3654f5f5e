"""Experts that are the whole feed-forward block over one frozen set of weights (MixLoRA, LLaVA-MoLE ...).

    h_k = act(W_g x + dg_k) * (W_u x + du_k),     y = W_d [c h_0 + sum_k w_k h_k] + s sum_k w_k B_d A_d h_k

The frozen W_d is linear, so it is applied once, to the mixed h: a routed FFN needs no base FLOPs beyond the dense one.
`c` is `Routing.base`, by default `1 - sum w`, so that untrained experts (B = 0) give the base whatever the gates sum
to; the rule's `shrink=True` sets c = 0 and lets `sum w` shrink the base (MixLoRA-dynamic).

`down="per_expert"` applies W_d to every expert's own h: for row factors that sit after W_d (DoRA).
T tokens, D width, F FFN width, E experts, K slots, R rank.
"""

import dataclasses

import jax
import jax.numpy as jnp

from kernels_pallas import routed_ffn
from kernels_pallas.routed_ffn.reference import ACTIVATIONS
from molora_jax.core import lowrank
from molora_jax.core import routing as routing_math
from molora_jax.core.types import Array, Factors
from molora_jax.placements.projection import latent_of

SITES = ("gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class Part:
    """One rule's experts: factors by site with the scale folded in, dropout masks by site, `idx, gates [T, K]`."""

    factors: dict[str, Factors]
    masks: dict[str, Array | None]
    latents: dict[str, object]
    idx: Array
    gates: Array
    base: Array
    per_expert: bool


def part(rule, p: dict, shared: dict, routing, contexts: dict, x: Array, ffn_width: int) -> Part:
    """`contexts` by site; `x [T, D]`. Without a router: one expert with weight 1."""
    adapter, T = rule.adapter, len(x)
    factors, masks, latents = {}, {}, {}
    for site in SITES:
        ctx = contexts[site]
        own = p.get(site, {})
        one = adapter.factors(own, shared, ctx)
        factors[site] = one.replace(B=one.B * adapter.scale())
        width = ffn_width if site == "down" else x.shape[-1]
        masks[site] = lowrank.dropout_mask(ctx.keyed(), adapter.dropout, (T, width), x.dtype)
        latents[site] = latent_of(adapter, own, ctx)
    if routing is None:
        idx, gates, base = jnp.zeros((T, 1), jnp.int32), jnp.ones((T, 1), jnp.float32), None
    else:
        idx, gates = routing_math.slots(routing)
        base = None if routing.base is None else routing.base.reshape(-1)
    if base is None:
        base = jnp.zeros(T) if rule.shrink else 1.0 - jnp.sum(gates, axis=-1)
    if rule.shrink and routing is not None:  # padding has no expert: keep its hidden state finite and the base's
        base = jnp.where(routing.valid.reshape(-1), base, 1.0)
    # one expert's W_d is applied once either way, but a row factor has to act after it
    per_expert = rule.down == "per_expert" or (routing is None and factors["down"].out is not None)
    return Part(factors, masks, latents, idx, gates, base, per_expert)


def _masked(x, mask):
    return x if mask is None else x * mask.astype(x.dtype)


def hidden(x: Array, g: Array, u: Array, one: Part, activation: str) -> tuple[Array, Array]:
    """The mixed hidden state and the rank activations of the low-rank down path.

    `x [T, D]`, `g, u [T, F]` shared projections -> `mix [T, F] = c h_0 + sum w_k h_k`, `z_d [T, K, R]`.
    """
    z = {
        site: lowrank.shrink_slots(_masked(x, one.masks[site]), one.factors[site], one.idx, one.latents[site]).astype(
            x.dtype
        )
        for site in ("gate", "up")
    }
    B_g, B_u, A_d = one.factors["gate"].B, one.factors["up"].B, one.factors["down"].A
    return routed_ffn(
        g, u, z["gate"], z["up"], B_g, B_u, A_d, one.idx, one.gates, one.base,
        activation=activation, mask=one.masks["down"],
    )  # fmt: skip


def low_rank_down(z_d: Array, one: Part, dtype) -> Array:
    """`s sum_k w_k B_d[e_k] z_d[k]`: `[T, D]`."""
    factors, E = one.factors["down"], one.factors["down"].B.shape[0]
    if one.latents["down"] is None and factors.mid is None:
        return lowrank.expand_slots(z_d, factors.B, one.idx, one.gates, dtype)
    z = lowrank.from_slots(z_d.astype(jnp.float32), one.idx, E)
    if one.latents["down"] is not None:
        z = one.latents["down"](z)
    if factors.mid is not None:
        z = jnp.einsum("ter,eqr->teq", z, factors.mid)
    gates = lowrank.from_slots(one.gates[..., None], one.idx, E)[..., 0]
    return lowrank.expand(z, factors.B, gates, dtype)


def is_plain(one: Part) -> bool:
    """True where the fused form holds: no row or column factors, W_d applied once."""
    return not one.per_expert and all(f.out is None and f.inp is None for f in one.factors.values())


def per_slot(x: Array, g: Array, u: Array, one: Part, activation: str, down) -> tuple[Array, Array]:
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
            y = lowrank.low_rank(_masked(seen, one.masks[site]), f, hot, one.latents[site])
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


def apply(x: Array, g: Array, u: Array, parts: list[Part], activation: str, down) -> tuple[Array, Array]:
    """All `ffn` rules of a block together: `sum_rules sum_k w_k (h_k - h_0)` on top of h_0.

    Returns `mix [T, F]` for the block's one frozen W_d, and `rest [T, D]` to add after it.
    """
    mixes, rest = [], jnp.zeros(x.shape, x.dtype)
    for one in parts:
        if is_plain(one):
            mix, z_d = hidden(x, g, u, one, activation)
            more = low_rank_down(z_d, one, x.dtype)
        else:
            mix, more = per_slot(x, g, u, one, activation, down)
        mixes.append(mix)
        rest = rest + more
    mix = sum(mixes)
    if len(parts) > 1:  # every rule brought its own c h_0
        mix = mix - (len(parts) - 1) * (ACTIVATIONS[activation](g) * u)
    return mix, rest
