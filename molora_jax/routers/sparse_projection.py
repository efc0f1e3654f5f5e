"""FlyLoRA: the k largest of a frozen sparse random projection, without a trained router (arXiv 2510.08396).

    h = W x,   I = the K largest of |h + d| (or of h + d),   g_i = 1 (i in I)
    d_i <- d_i + u sign(mean(count) - count_i)             once a step, no gradient; count_i: tokens that chose i

W [E, D] has round(density D) entries a row and follows from `seed`. With the adapter `lora_sparse_a` of rank 1, the
same seed and density it is A itself: a rank's own projection chooses it and is its weight. d is for the choice alone.
E experts (ranks), D width, K active.
"""

import dataclasses
from typing import ClassVar, Literal

import jax.numpy as jnp

from molora_jax.core import lowrank, routing, sparse_projection
from molora_jax.routers.base import Router


@dataclasses.dataclass(frozen=True)
class SparseProjection(Router):
    """`select`: by size (the paper's text) or signed (its formula, and the package): negative projections, half of the
    signal, are then hardly ever chosen. `bias_rate` is u.
    """

    k: int = 8
    density: float = 0.25
    seed: int = 0
    select: Literal["abs", "signed"] = "abs"
    bias_rate: float = 1e-3

    LIMITS: ClassVar = {"k": (1, None), "density": (0, 1, "(]"), "seed": (0, None), "bias_rate": (0.0, None)}
    FROZEN: ClassVar[tuple[str, ...]] = ("W",)
    REFUSES: ClassVar = (
        ("router.seed",
         (("adapter.name", "is", "lora_sparse_a"), ("adapter.rank", "is", 1),
          ("router.seed", "differs from", "adapter.seed")),
         "the adapter's seed: with rank 1 the router is the adapter's own A, and of two matrices the ranks that act "
         "are not those whose projections are large",
         "Set {where}.router.seed and {where}.adapter.seed alike."),
        ("router.density",
         (("adapter.name", "is", "lora_sparse_a"), ("adapter.rank", "is", 1),
          ("router.density", "differs from", "adapter.density")),
         "the adapter's density: with rank 1 the router is the adapter's own A, and of two matrices the ranks that act "
         "are not those whose projections are large",
         "Set {where}.router.density and {where}.adapter.density alike."),
    )  # fmt: skip

    def k_max(self, experts):
        return min(self.k, experts)

    def init_leaves(self, key, site, layer):
        return {"W": sparse_projection.rows(self.seed, site, layer, site.experts, self.density)}

    def init_state(self, site):
        return {"d": jnp.zeros(site.experts)}

    def route(self, p, shared, x, ctx):
        flat = x.reshape(-1, x.shape[-1])  # the adapter's dropped input: the very h that is its weight
        x = lowrank.dropped(flat, lowrank.dropout(ctx.keyed(), ctx.dropout), jnp.arange(len(flat))).reshape(x.shape)
        h = routing.logits(p["W"], x)
        score = h + ctx.state["d"]
        score = jnp.abs(score) if self.select == "abs" else score
        mask = routing.permitted(ctx.allowed)
        selected = routing.top_k(jnp.where(mask, score, routing.NEG_INF), self.k) & mask
        probs = routing.softmax(score, ctx.allowed)  # for statistics and losses
        gates = selected.astype(jnp.float32)
        decision = routing.finish(gates, selected, h, probs, ctx, k_max=self.k_max(h.shape[-1]))
        return decision, ctx.carry, {"count": routing.counts(decision)}

    def update(self, state, sums):
        return {"d": routing.with_load(state["d"], sums["count"], self.bias_rate)}
