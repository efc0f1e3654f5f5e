"""Top-p: the shortest prefix of experts whose probabilities pass p (Dynamic MoE, arXiv 2403.07652, section 3.2).

    p = softmax(W x), sorted down;   t = smallest k with sum_{j<=k} p_j > P;   g_e = p_e for the first t, else 0

Easy tokens use few experts, hard ones many. Gates are not renormalised: they sum to the kept mass.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from molora_jax.core import routing
from molora_jax.routers.base import Router


@dataclasses.dataclass(frozen=True)
class TopP(Router):
    """`max_experts` bounds a token's experts (0: all E); what it cuts is counted in `Routing.clipped`."""

    p: float = 0.4
    renormalise: bool = False
    max_experts: int = 0

    LIMITS: ClassVar = {"p": (0, None, "()"), "max_experts": (0, None)}

    def k_max(self, experts):
        return min(self.max_experts or experts, experts)

    def route(self, p, shared, x, ctx):
        z = routing.logits(p["W"], x)
        probs = routing.softmax(z, ctx.allowed)
        wanted = routing.top_p(probs, self.p) & routing.permitted(ctx.allowed)
        k_max = self.k_max(z.shape[-1])
        selected = wanted & routing.top_k(probs, k_max)
        clipped = jnp.sum(wanted, axis=-1) - jnp.sum(selected, axis=-1)
        gates = jnp.where(selected, probs, 0.0)
        if self.renormalise:
            gates = gates / jnp.sum(gates, axis=-1, keepdims=True)
        decision = routing.finish(
            gates, selected, z, probs, ctx, k_max=k_max, clipped=clipped, sums_to_one=self.renormalise
        )
        return decision, ctx.carry, {}
