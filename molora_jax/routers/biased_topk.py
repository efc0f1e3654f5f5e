"""Scores over all experts, the top K of score plus load bias, the score alone as gate (DeepSeekMoE, arXiv 2401.06066).

    p = softmax(W x),   S = the K largest of p + b,   g_e = p_e for e in S, else 0
    b_e <- b_e + u sign(mean(count) - count_e)              once a step, no gradient; count_e: tokens that chose e

With u = 0 (b stays 0) this is the paper's router: the softmax over all routed experts comes first and gates are not
renormalised, so they sum to less than 1. u > 0 is its loss-free balancing (arXiv 2408.15664, which takes u = 1e-3 and
`score="sigmoid"`): b leads to the choice of other experts and never enters a gate. Shared experts have no place here:
they are a rule without a router. E experts, K active.
"""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from molora_jax.core import routing
from molora_jax.routers.base import Router


@dataclasses.dataclass(frozen=True)
class BiasedTopK(Router):
    """`bias_rate` is u. `renormalise`: gates over their sum (Mixtral's; the code's `norm_topk_prob`, false there)."""

    k: int = 4
    score: Literal["softmax", "sigmoid"] = "softmax"
    renormalise: bool = False
    bias_rate: float = 0.0

    LIMITS: ClassVar = {"k": (1, None), "bias_rate": (0.0, None)}

    def k_max(self, experts):
        return min(self.k, experts)

    def init_state(self, site):
        return {"b": jnp.zeros(site.experts)}

    def route(self, p, shared, x, ctx):
        z = routing.logits(p["W"], x)
        mask = routing.permitted(ctx.allowed)
        if self.score == "softmax":
            score = probs = routing.softmax(z, ctx.allowed)
        else:
            score = jnp.where(mask, jax.nn.sigmoid(z), 0.0)
            probs = routing.normalised(score)  # for statistics and losses: a distribution
        selected = routing.top_k(jnp.where(mask, score + ctx.state["b"], routing.NEG_INF), self.k) & mask
        gates = jnp.where(selected, score, 0.0)
        if self.renormalise:
            gates = routing.normalised(gates)
        decision = routing.finish(
            gates, selected, z, probs, ctx, k_max=self.k_max(z.shape[-1]), sums_to_one=self.renormalise
        )
        return decision, ctx.carry, {"count": routing.counts(decision)}

    def update(self, state, sums):
        return {"b": routing.with_load(state["b"], sums["count"], self.bias_rate)}
