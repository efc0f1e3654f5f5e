"""Experts that are the whole feed-forward block over one frozen set of weights (MixLoRA, LLaVA-MoLE ...).

    h_k = act(W_g x + dg_k) * (W_u x + du_k),     y = W_d [c h_0 + sum_k w_k h_k] + s sum_k w_k B_d A_d h_k

The frozen W_d is linear, so it is applied once, to the mixed h: a routed FFN needs no base FLOPs beyond the dense one.
`c` is `Routing.base_gate`, by default `1 - sum w`, so that untrained experts (B = 0) give the base whatever the gates
sum to; the rule's `shrink=True` sets c = 0 where a token has an expert and lets `sum w` scale the base
(MixLoRA-dynamic).

`down="per_expert"` applies W_d to every expert's own h: for row factors that sit after W_d (DoRA).
Where tokens travel, x goes, `w_k (W_d h_k + s B_d A_d h_k)` comes back, and home keeps the frozen h_0; a dropped slot
has h_0 in its place. The place in the batch travels too: the down path's dropout is drawn at the expert.
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
from molora_jax.placements.base import At, Axes, Part, Placement, Region, replicated
from molora_jax.placements.projection import latent_of

SITES = ("gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class Hidden(Region):
    """A feed-forward block up to its frozen down projection.

    `x [T, D]`; `g, u [T, F]`, the shared projections; frozen kernels `gate, up, down`. Comes out: `mix [T, F]`, to be
    sent through W_d, and `rest [T, D]` to add to that.
    """

    activation: str

    inner: ClassVar[Axes | None] = Axes(("in",), "down")

    def axes(self):
        found = {"x": Axes(("tokens", "width"))}
        found |= {name: Axes(("tokens", "out"), site) for name, site in (("g", "gate"), ("u", "up"))}
        return found | {site: Axes(("in", "out"), site) for site in SITES}

    def outs(self):
        return Axes(("tokens", "out"), "gate"), Axes(("sum", "tokens", "width"))

    def enter(self, arrays, parts, *, moved, split):
        used = SITES if moved else ("down",) if any(part.per_expert for part in parts) else ()
        # Where tokens travel and F is split, x itself has to enter, with a cotangent of width D to be summed over the
        # shards, as that of the base's gate and up is. So these (no rule changes them, see REDONE) are made inside:
        # one sum serves all of them.
        shared = () if moved and split else ("g", "u")
        return {name: arrays[name] for name in ("x", *shared, *used)}

    def start(self, arrays, parts, at):
        if "g" not in arrays:
            g, u = (lowrank.frozen_linear(arrays[site], arrays["x"]) for site in ("gate", "up"))
            arrays = arrays | {"g": g, "u": u}
        arrays = arrays | {"activation": self.activation}
        return arrays, (0, jnp.zeros(arrays["x"].shape, arrays["x"].dtype))

    def close(self, arrays, out, parts):
        mix, rest = out
        if parts > 1:  # every part brought its own c h_0
            mix = mix - (parts - 1) * alone(arrays)
        return mix, rest


def alone(arrays: dict) -> Array:
    """h_0, of the frozen block."""
    return ACTIVATIONS[arrays["activation"]](arrays["g"]) * arrays["u"]


@flax.struct.dataclass
class FFNPart(Part):
    """One rule's experts: factors (with the scale set) and dropout by site, `idx, gates [T, K]`, `base_gate [T]`."""

    factors: dict[str, Factors]
    dropout: dict[str, lowrank.Dropout | None]
    idx: Array
    gates: Array
    base_gate: Array
    routed: bool = flax.struct.field(pytree_node=False)
    per_expert: bool = flax.struct.field(pytree_node=False)
    latents: tuple = flax.struct.field(pytree_node=False)
    experts: int = flax.struct.field(pytree_node=False)
    placement: Placement = flax.struct.field(pytree_node=False)

    def latent(self, site: str):
        return self.latents[SITES.index(site)]

    @property
    def decision(self):
        return self.idx, self.gates

    def axes(self, rank_space):
        return self.replace(
            factors={site: self.placement.axes(f, site, rank_space) for site, f in self.factors.items()},
            idx=Axes(("tokens", None)), gates=Axes(("tokens", None)), base_gate=Axes(("tokens",)),
            dropout=replicated(self.dropout),
        )  # fmt: skip

    def early(self, x, at):
        """Gate's and up's rank activations.

        Inside the region x would be an input that is equal on all shards, its cotangent a sum over them of width D: the
        base model has none there. So x stays outside and only rank-wide arrays are summed.
        """
        return ranks(x, self, at.rows) if is_plain(self) else None

    def here(self, arrays, out, at, early=None):
        mix, rest = out
        x, g, u, activation = (arrays[name] for name in ("x", "g", "u", "activation"))
        if is_plain(self):
            z = ranks(x, self, at.rows) if early is None else early
            own_mix, z_d = hidden(z, g, u, self, activation, at.rows, at.shard)
            down = low_rank_down(z_d, self, x.dtype)
        else:
            frozen = lambda h: lowrank.frozen_linear(arrays["down"], h)  # noqa: E731
            own_mix, down = per_slot(x, g, u, self, activation, frozen, at.rows, at.shard)
        return mix + own_mix, rest + down

    def sends(self, arrays, at, rank_space):
        return arrays["x"]

    def there(self, arrays, rows, shard):
        """Every row is a token with one slot whose block is frozen but for that slot's expert."""
        part = self.replace(
            idx=rows.expert[:, None], gates=rows.gates[:, None], base_gate=jnp.zeros(len(rows.x), bool)
        )  # fmt: skip
        g, u = (lowrank.frozen_linear(arrays[site], rows.x) for site in ("gate", "up"))
        arrays = arrays | {"x": rows.x, "g": g, "u": u}
        mix, rest = part.here(arrays, (0, jnp.zeros(rows.x.shape, rows.x.dtype)), At(rows.ids, shard))
        return lowrank.frozen_linear(arrays["down"], mix) + rest

    def stay(self, arrays, out, back, lost):
        mix, rest = out
        h0 = alone(arrays)
        return mix + ((self.base_gate + lost)[:, None] * h0).astype(h0.dtype), rest + back


def ranks(x: Array, part: FFNPart, rows: Array) -> dict[str, Array]:
    """Scaled rank activations `[T, K, R]` of gate and up at the token's experts, from `x [T, D]`."""
    z = {}
    for site in ("gate", "up"):
        seen = lowrank.dropped(x, part.dropout[site], rows)
        factors = part.factors[site]
        z[site] = (factors.scale * lowrank.shrink_slots(seen, factors, part.idx, part.latent(site))).astype(x.dtype)
    return z


def hidden(z: dict, g: Array, u: Array, part: FFNPart, activation: str, rows: Array, shard) -> tuple[Array, Array]:
    """The mixed hidden state and the rank activations of the low-rank down path.

    `z` from `ranks`, `g, u [T, F]` shared projections -> `mix [T, F] = c h_0 + sum w_k h_k`, `z_d [T, K, R]`.
    """
    B_g, B_u, A_d = (part.factors[site].by_expert(name) for site, name in (("gate", "B"), ("up", "B"), ("down", "A")))
    drop, ways = part.dropout["down"], shard[1]
    mask = None if drop is None else drop.mask(rows, g.shape[1] * ways, g.dtype, shard=shard)
    return routed_ffn(
        g, u, z["gate"], z["up"], B_g, B_u, A_d, part.idx, part.gates, part.base_gate, activation=activation, mask=mask
    )


def low_rank_down(z_d: Array, part: FFNPart, dtype) -> Array:
    """`s sum_k w_k B_d[e_k] z_d[k]`: `[T, D]`."""
    factors, E = part.factors["down"], part.factors["down"].B.shape[0]
    gates = factors.scale * part.gates
    if part.latent("down") is None and factors.mid is None:
        return lowrank.expand_slots(z_d, factors, part.idx, gates, dtype)
    z = lowrank.from_slots(z_d.astype(jnp.float32), part.idx, E)
    if part.latent("down") is not None:
        z = part.latent("down")(z)
    if factors.mid is not None:
        z = jnp.einsum("ter,eqr->teq", z, factors.mid)
    return lowrank.expand(z, factors.B, lowrank.from_slots(gates[..., None], part.idx, E)[..., 0], dtype)


def is_plain(part: FFNPart) -> bool:
    """True where the fused form holds: products alone, no row or column factors, W_d applied once."""
    plain = (f.out is None and f.inp is None and f.form is None for f in part.factors.values())
    return not part.per_expert and all(plain)


def per_slot(x: Array, g: Array, u: Array, part: FFNPart, activation: str, down, rows, shard) -> tuple[Array, Array]:
    """The general form: every slot's own h, row and column factors included, W_d per slot where asked for.

    `down(h [T, F]) -> [T, D]` applies the frozen W_d. Returns `mix [T, F]` still to be sent through W_d (zero beyond
    `c h_0` with `per_expert`) and the rest of the output `[T, D]`.
    """
    act = ACTIVATIONS[activation]
    E = part.factors["gate"].B.shape[0]
    mix = (part.base_gate[:, None] * (act(g) * u)).astype(x.dtype)
    rest = jnp.zeros(x.shape, jnp.float32)

    @jax.checkpoint  # keeps one slot's [T, F] at a time
    def slot(idx, w):
        hot = (idx[:, None] == jnp.arange(E)).astype(jnp.float32)  # one-hot gates: the slot's expert with weight 1

        def change(site, seen, base):
            f = part.factors[site]
            seen = lowrank.dropped(seen, part.dropout[site], rows, shard if site == "down" else (0, 1))
            y = lowrank.low_rank(seen, f, hot, part.latent(site))
            return y if f.out is None else y + (base * lowrank.combine(f.out, hot)).astype(y.dtype)

        def scaled(site, seen):
            f = part.factors[site].inp
            return seen if f is None else seen * (1 + lowrank.combine(f, hot)).astype(seen.dtype)

        if any(part.factors[s].inp is not None for s in ("gate", "up")):
            raise ValueError("column factors (inp) on a routed FFN's gate and up need their own base product")
        h = act(g + change("gate", x, g)) * (u + change("up", x, u))
        h = scaled("down", h)
        w = jnp.where(idx < E, w, 0.0)[:, None]
        if part.per_expert:
            base = down(h)
            return jnp.zeros_like(h), w * (base + change("down", h, base))
        return (w * h).astype(h.dtype), w * change("down", h, 0.0)

    for k in range(part.idx.shape[1]):
        own_mix, out = slot(part.idx[:, k], part.gates[:, k])
        mix, rest = mix + own_mix, rest + out
    return mix, rest.astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class FFN(Placement):
    NAME: ClassVar[str] = "ffn"
    SITES: ClassVar[tuple[str, ...]] = ("ffn",)
    OWNS: ClassVar[tuple[str, ...] | None] = ("gate", "up", "down")
    REDONE: ClassVar[tuple[str, ...]] = ("gate", "up")
    IDS: ClassVar[int] = 2
    REFUSES: ClassVar[tuple] = (
        (
            "adapter.name", (("adapter.name", "states", "DENSE"),),
            "factors of low rank: [T, K] rows of an inner width near D are as large as what W_d (the down projection) "
            "gives each expert, which applying it once is to save",
            "List gate,up,down as sites.",
        ),
        (
            "down", (("router.name", "given", True), ("down", "is", "once"), ("adapter.name", "states", "ROW_FACTORS"),
             ("adapter.name", "states", "AFTER_DOWN")),
            "'per_expert'",
            "The row factor sits after W_d (the down projection) and differs between experts, so W_d cannot be applied "
            'once for all: write down="per_expert" ({where}.down; W_d is then applied K times).',
        ),
    )  # fmt: skip

    def ends(self, rule, meeting):
        return True

    def part(self, rule, site, p, shared, routing, context, x):
        adapter, T = rule.adapter, len(x)
        factors, dropout, latents = {}, {}, []
        for name in SITES:
            ctx, own = context(name), p.get(name, {})
            found = lowrank.located(adapter.factors(own, shared, ctx), own, ctx.stack)
            factors[name] = found.replace(scale=adapter.scale())
            dropout[name] = lowrank.dropout(ctx.keyed(), adapter.dropout)
            latents.append(latent_of(adapter, own, ctx))
        if routing is None:
            idx, gates, c = jnp.zeros((T, 1), jnp.int32), jnp.ones((T, 1), jnp.float32), jnp.zeros(T, bool)
        else:
            idx, gates = routing_math.slots(routing)
            if routing.base_gate is not None:
                c = routing.base_gate.reshape(-1)
            elif rule.gates_scale_base:  # a token without any expert (padding is one) keeps the base's
                c = ~jnp.any(routing.selected, axis=-1).reshape(-1)
            else:
                c = 1.0 - jnp.sum(gates, axis=-1)
        # one expert's W_d is applied once either way, but a row factor has to act after it
        per_expert = rule.down == "per_expert" or (routing is None and factors["down"].out is not None)
        return FFNPart(
            factors, dropout, idx, gates, c, routed=routing is not None, per_expert=per_expert, latents=tuple(latents),
            experts=factors["gate"].B.shape[0], placement=self,
        )  # fmt: skip
