"""LoRA on the experts that a base brings itself (Mixtral, OLMoE, Qwen-MoE): the base routes, its kernels stay frozen.

    h_k = act(W_g[e_k] x + s B_g A_g x) * (W_u[e_k] x + s B_u A_u x),   y = sum_k w_k (W_d[e_k] h_k + s B_d A_d h_k)

e_k, w_k are the base's own decision. `factors`:
    own            a pair A, B for each of the base's experts (A [E, R, D_in], B [E, R, D_out])
    one            one pair for all of them (A [1, R, D_in], B [1, R, D_out])
    shared_outer   what touches the model's width is shared: A of gate and up, B of down; the rest is each expert's own
The base's router is frozen, or a copy of it trains (the rule's `base_router="trained"`): gates then get gradients, and
losses on routing read its decisions.

Kernels `[E, D, F]`, `[E, F, D]` are read by expert: on one device from the stack of all layers (`tiles.InStack`), on a
mesh in shards over `expert`, gathered or met by travelling tokens as the engine says, together with their factors. A
base drops no token, whatever the engine's capacity. T tokens, D width, F FFN width, E experts, K slots, R rank.
"""

import dataclasses
from typing import ClassVar, Literal

import flax.struct
import jax
import jax.numpy as jnp

from kernels_pallas import moe_ffn
from molora_jax.config.fields import FFN as SITES
from molora_jax.core import lowrank
from molora_jax.core import routing as routing_math
from molora_jax.core.types import Array, Factors
from molora_jax.placements.base import At, Axes, Part, Placement, Region, of_kernel, replicated

BIASES = tuple(f"{site}_bias" for site in SITES)


@dataclasses.dataclass(frozen=True)
class Experts(Region):
    """A feed-forward block of experts: `x [T, D]` -> `[T, D]`, a partial sum where F is split."""

    inner: ClassVar[Axes | None] = Axes(("in",), "down")


@flax.struct.dataclass
class BaseExpertsPart(Part):
    """The base's experts: frozen `kernels` by site, with biases also `gate_bias, up_bias [E, F]`, `down_bias [E, D]`;
    `factors` (with the scale set) and dropout by site where a rule changes them (else empty), `idx, gates [T, K]`."""

    kernels: dict[str, Array]
    factors: dict[str, Factors]
    dropout: dict[str, lowrank.Dropout | None]
    idx: Array
    gates: Array
    activation: str = flax.struct.field(pytree_node=False)
    experts: int = flax.struct.field(pytree_node=False)
    placement: Placement = flax.struct.field(pytree_node=False)
    routed: bool = flax.struct.field(pytree_node=False, default=True)

    @property
    def decision(self):
        return self.idx, self.gates

    def axes(self, rank_space):
        tokens = Axes(("tokens", None))
        widths = {"gate": ("width", "out"), "up": ("width", "out"), "down": ("in", "width")}
        kernels = {site: Axes(("frozen_expert", *widths[site]), site) for site in SITES}
        kernels |= {f"{site}_bias": Axes(("frozen_expert", widths[site][1]), site) for site in SITES}
        kernels = {name: of_kernel(W, kernels[name]) for name, W in self.kernels.items()}
        E = self.kernels["gate"].shape[0]  # with masked ones
        factors = {site: self.placement.axes(f, site, rank_space, E) for site, f in self.factors.items()}
        return self.replace(
            kernels=kernels, factors=factors, dropout=replicated(self.dropout), idx=tokens, gates=tokens
        )

    def here(self, arrays, out, at, early=None):
        x, f = arrays["x"], self.factors
        kernels, bias = [self.kernels[site] for site in SITES], None
        if BIASES[0] in self.kernels:
            b_g, b_u, b_d = (self.kernels[name] for name in BIASES)
            # a shard of F has a part of the sum over F, and the whole of this bias
            bias = b_g, b_u, b_d if at.shard[1] == 1 else b_d.astype(jnp.float32) / at.shard[1]
        form = dict(activation=self.activation, bias=bias)
        if not f:
            return moe_ffn(x, *kernels, None, self.idx, self.gates, **form)[0]
        z = []
        for site in ("gate", "up"):
            seen = lowrank.dropped(x, self.dropout[site], at.rows)
            z.append((f[site].scale * slots(seen, f[site], self.idx, kernels[0].shape[0])).astype(x.dtype))
        drop, width = self.dropout["down"], kernels[0].shape[2]
        mask = None if drop is None else drop.mask(at.rows, width * at.shard[1], x.dtype, shard=at.shard)
        low = (*z, f["gate"].by_expert("B"), f["up"].by_expert("B"), f["down"].by_expert("A"))
        y, z_d = moe_ffn(x, *kernels, low, self.idx, self.gates, mask=mask, **form)
        gates = f["down"].scale * self.gates
        if f["down"].B.shape[0] > 1:
            return y + lowrank.expand_slots(z_d, f["down"], self.idx, gates, x.dtype)
        z_d = jnp.einsum("tk,tkr->tr", gates, z_d.astype(jnp.float32))  # one B: the slots are summed in rank space
        return y + jnp.dot(z_d.astype(x.dtype), f["down"].B[0].astype(x.dtype))

    def sends(self, arrays, at, rank_space):
        return arrays["x"]

    def there(self, arrays, rows, shard):
        part = self.replace(idx=rows.expert[:, None], gates=rows.gates[:, None])
        return part.here({"x": rows.x}, None, At(rows.ids, shard))

    def stay(self, arrays, out, back, lost):
        return back


def slots(x: Array, factors: Factors, idx: Array, experts: int) -> Array:
    """`A x` at the token's experts: `[T, K, R]`, 0 at an unused slot, also where all experts have one A."""
    z = lowrank.shrink_slots(x, factors, idx)
    return z if factors.A.shape[0] > 1 else jnp.where((idx < experts)[..., None], z, 0.0)


@dataclasses.dataclass(frozen=True)
class BaseExperts(Placement):
    factors: Literal["own", "one", "shared_outer"] = "own"

    NAME: ClassVar[str] = "base_experts"
    NAMED: ClassVar[bool] = True
    NEEDS: ClassVar[tuple[str, ...]] = ("experts",)
    SITES: ClassVar[tuple[str, ...]] = ("ffn",)
    OWNS: ClassVar[tuple[str, ...] | None] = ("gate", "up", "down")
    LOADS: ClassVar[bool] = False
    BASE_ROUTER: ClassVar[bool] = True
    IDS: ClassVar[int] = 2
    DROPS: ClassVar[bool] = False
    REFUSES: ClassVar[tuple] = (
        (
            "router.name", (("router.name", "given", True),),
            "no router, for the base routes to its own experts",
            "Leave it out; base_router='trained' trains the base's.",
        ),
        (
            "adapter.name", (("adapter.name", "not in", ("lora", "rslora", "lora_fa")),),
            "lora, rslora or lora_fa: factors of a base's expert are a pair A, B", "Use lora.",
        ),
        ("adapter.init", (("adapter.init", "needs", "base"),), "a start that reads no base weight", "Use kaiming."),
        ("adapter.init", (("adapter.init", "needs", "base_grad"),), "a start that reads no gradient", "Use kaiming."),
    )  # fmt: skip

    def acts(self, rule):
        return ("experts",)

    def meetings(self, rule):
        return ("ffn",)

    def ends(self, rule, meeting):
        return True

    def experts(self, config, experts):
        return config.experts

    def slots(self, rule, experts, config):
        return config.active

    def frozen(self, config, meeting):
        return sum(config.experts * d_in * d_out for d_in, d_out in map(config.dims, SITES))

    def kept(self, site, leaves):
        """A and B `[L, E, R, D]`, one of those that all experts share."""
        shared = {"own": "", "one": "AB", "shared_outer": "B" if site == "down" else "A"}[self.factors]
        return {name: leaf[:, :1] if name in shared else leaf for name, leaf in leaves.items()}


def part(kernels: dict, routing, activation: str, experts: int, *, rule=None, leaves=None, shared=None, context=None):
    """The base's experts under its decision, with a rule's change of them.

    Args:
      kernels: frozen, by site. leaves: the rule's at this layer; context: name of a site -> `Context`.
    """
    idx, gates = routing_math.slots(routing)
    factors, dropout = {}, {}
    for site in SITES if rule is not None else ():
        own, ctx = leaves.get(site, {}), context(site)
        found = lowrank.located(rule.adapter.factors(own, shared, ctx), own, ctx.stack)
        factors[site] = found.replace(scale=rule.adapter.scale())
        dropout[site] = lowrank.dropout(ctx.keyed(), rule.adapter.dropout)
    placement = BaseExperts() if rule is None else rule.placement
    return BaseExpertsPart(jax.lax.stop_gradient(kernels), factors, dropout, idx, gates, activation, experts, placement)
