"""Scores over all experts, the top K of score plus load bias, the score alone as gate (DeepSeekMoE, arXiv 2401.06066).

    p = softmax(W x),   S = the K largest of p + b,   g_e = p_e for e in S, else 0
    b_e <- b_e + u sign(mean(count) - count_e)              once a step, no gradient; count_e: tokens that chose e

With u = 0 (b stays 0) this is the paper's router: the softmax over all routed experts comes first and gates are not
renormalised, so they sum to less than 1. u > 0 is its loss-free balancing (arXiv 2408.15664, which takes u = 1e-3 and
`score="sigmoid"`): b leads to the choice of other experts and never enters a gate. `bias="quantile"` sets b_e to minus
the value that a share K / E of the batch's scores of e exceed, so that each expert's own column decides how much it is
chosen. `groups` > 1 looks for the K experts in the `keep_groups` best groups alone (DeepSeek-V2 and V3: a group's
experts lie together, so a token goes to few devices). Shared experts have no place here: they are a rule without a
router. E experts, K active.
"""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from molora_jax.core import routing
from molora_jax.errors import InputError
from molora_jax.routers.base import Router

BINS = 256  # of the scores in [0, 1], of which the quantiles are read


@dataclasses.dataclass(frozen=True)
class BiasedTopK(Router):
    """`bias_rate` is u; of the quantile it is the part of the way that b goes each step.

    `renormalise`: gates over their sum (Mixtral's; the code's `norm_topk_prob`, false there; of k = 1 the gate is then
    1 and teaches nothing). `scale` multiplies the gates (DeepSeek-V3: 2.5). `score="sqrt_softplus"` is sqrt(log(1 +
    exp z)), which has no upper end. `keep_groups=0` is all; `group_score`: see `routing.in_groups`.
    """

    k: int = 4
    score: Literal["softmax", "sigmoid", "sqrt_softplus"] = "softmax"
    renormalise: bool = False
    bias_rate: float = 0.0
    bias: Literal["sign", "quantile"] = "sign"
    scale: float = 1.0
    groups: int = 1
    keep_groups: int = 0
    group_score: Literal["max", "top2", "share"] = "max"

    LIMITS: ClassVar = {
        "k": (1, None), "bias_rate": (0.0, None), "scale": (0, None, "()"), "groups": (1, None),
        "keep_groups": (0, None),
    }  # fmt: skip
    REFUSES: ClassVar = (
        ("router.bias", (("router.bias", "is", "quantile"), ("router.score", "is", "sqrt_softplus")),
         "'sign' with scores that have no upper end: quantiles are read from bins of [0, 1]",
         "Set {where}.router.bias='sign', or score='sigmoid'."),
    )  # fmt: skip

    def k_max(self, experts):
        return min(self.k, experts)

    def check(self, where, experts, tasks):
        """Raises InputError where the groups do not divide E, or cannot hold K experts."""
        groups, keep = self.groups, self._kept
        if experts % groups:
            raise InputError(
                f"{where}.groups", got=f"{groups} groups of {experts} experts", expected=f"a divisor of {experts}",
                fix=f"Change {where}.groups or experts.",
            )  # fmt: skip
        if keep * (experts // groups) < self.k:
            raise InputError(
                f"{where}.keep_groups", got=f"{keep} groups of {experts // groups} experts, k={self.k}",
                expected="groups that hold at least k experts", fix=f"Raise {where}.keep_groups, or lower k.",
            )  # fmt: skip

    @property
    def _kept(self):
        return min(self.keep_groups or self.groups, self.groups)

    def init_state(self, site):
        return {"b": jnp.zeros(site.experts)}

    def route(self, p, shared, x, ctx):
        z = routing.logits(p["W"], x)
        mask = routing.permitted(ctx.allowed)
        if self.score == "softmax":
            score = probs = routing.softmax(z, ctx.allowed)
        else:
            value = jax.nn.sigmoid(z) if self.score == "sigmoid" else jnp.sqrt(jax.nn.softplus(z))
            score = jnp.where(mask, value, 0.0)
            probs = routing.normalised(score)  # for statistics and losses: a distribution
        biased = jnp.where(mask, score + ctx.state["b"], routing.NEG_INF)
        if self.groups > 1:
            here = routing.in_groups(biased, self.groups, self._kept, self.k, by=self.group_score)
            biased = jnp.where(here, biased, routing.NEG_INF)
        selected = routing.top_k(biased, self.k) & mask & (biased > routing.NEG_INF / 2)
        gates = jnp.where(selected, score, 0.0)
        if self.renormalise:
            gates = routing.normalised(gates)
        decision = routing.finish(
            self.scale * gates, selected, z, probs, ctx, k_max=self.k_max(z.shape[-1]),
            sums_to_one=self.renormalise and self.scale == 1,
        )  # fmt: skip
        return decision, ctx.carry, self._sums(decision, score, ctx)

    def _sums(self, decision, score, ctx):
        """Of the whole batch: counts, or for quantiles how many scores lie in each bin `[E, BINS]`."""
        if self.bias == "sign":
            return {"count": routing.counts(decision)}
        at = jnp.clip((score * BINS).astype(jnp.int32), 0, BINS - 1).reshape(-1, score.shape[-1])
        seen = jnp.broadcast_to(ctx.valid[..., None] & routing.permitted(ctx.allowed), score.shape)
        seen = seen.reshape(at.shape).astype(jnp.float32)
        return {"bins": jax.vmap(lambda at, seen: jnp.zeros(BINS).at[at].add(seen), in_axes=1)(at, seen)}

    def update(self, state, sums):
        if self.bias == "sign":
            return {"b": routing.with_load(state["b"], sums["count"], self.bias_rate)}
        total, E = jnp.sum(sums["bins"], axis=-1), len(state["b"])
        above = total[:, None] - jnp.cumsum(sums["bins"], axis=-1)  # scores beyond each bin's upper end
        upper = (jnp.argmax(above <= self.k / E * total[:, None], axis=-1) + 1) / BINS
        moved = state["b"] + jnp.minimum(self.bias_rate, 1.0) * (-upper - state["b"])
        return {"b": jnp.where(total > 0, moved, state["b"])}
