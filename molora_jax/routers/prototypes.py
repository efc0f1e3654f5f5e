"""Expert prototyping: experts in K groups, the best one of each (M6-T, Yang et al. 2021, arXiv 2105.15082).

    group q: the q-th run of E / K experts;   p = softmax inside a group,   g_e = p_e for the best e of each, else 0

K independent top-1 routers whose experts cannot meet: K are active without a top-K. Gates are not renormalised. Losses
read p / K, which sums to 1. E experts, K `groups`.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from molora_jax.core import routing
from molora_jax.routers.base import Router


@dataclasses.dataclass(frozen=True)
class Prototypes(Router):
    """Where the groups do not divide E, their sizes differ by one; experts that are shut out have no place in them."""

    groups: int = 2

    LIMITS: ClassVar = {"groups": (1, None)}

    def k_max(self, experts):
        return min(self.groups, experts)

    def route(self, p, shared, x, ctx):
        z = routing.logits(p["W"], x)
        K = self.k_max(z.shape[-1])
        place, count = routing.places(ctx.allowed, z.shape[-1])
        group = jnp.where(place >= 0, place * K // jnp.maximum(count, 1), -1)
        probs, selected = jnp.zeros(z.shape), jnp.zeros(z.shape, bool)
        for q in range(K):
            here = jnp.broadcast_to(group == q, z.shape)
            own = jnp.where(here, z, routing.NEG_INF)
            probs = jnp.where(here, jax.nn.softmax(own, axis=-1), probs)
            selected |= routing.top_k(own, 1) & here
        gates = jnp.where(selected, probs, 0.0)
        return routing.finish(gates, selected, z, routing.normalised(probs), ctx, k_max=K), ctx.carry, {}
