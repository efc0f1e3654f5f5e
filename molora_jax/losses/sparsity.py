"""LD-MoLE's sparsity loss (arXiv 2509.25684): pulls Sparsegen's lambda up until at most k experts are active.

    l = mean over tokens of relu(lower_k - lambda),   lower_k = 1 - (U_k - k u_(k+1)),   U_k: sum of the k largest u

Exactly k experts are active iff lower_k <= lambda < lower_(k-1). u carries no gradient: the router would spread its
logits instead. Padding does not count (in the code it does). One value a router, their mean. With E <= k it is 0.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from molora_jax.core.routing import NEG_INF, permitted
from molora_jax.losses.base import Loss, leaves


def lower(u, k):
    """lower_k `[...]` of `u [..., E]`, 1 <= k < E."""
    ranked = -jnp.sort(-u, axis=-1)
    return 1 - jnp.sum(ranked[..., :k] - ranked[..., k : k + 1], axis=-1)


@dataclasses.dataclass(frozen=True)
class Sparsity(Loss):
    weight: float = 0.1
    k: int = 2

    LIMITS: ClassVar = {"k": (1, None)}
    ROUTERS: ClassVar[tuple[str, ...]] = ("sparsegen",)

    def stats(self, routing, ctx):
        tokens = jnp.sum(routing.valid, dtype=jnp.float32)
        if routing.sparsity is None or routing.logits.shape[-1] <= self.k:
            return {"hinge": jnp.zeros(()), "tokens": tokens}
        u = jnp.where(permitted(ctx.allowed), jax.lax.stop_gradient(routing.logits), NEG_INF)
        hinge = jax.nn.relu(lower(u, self.k) - routing.sparsity)
        return {"hinge": jnp.sum(jnp.where(routing.valid, hinge, 0.0)), "tokens": tokens}

    def value(self, stats):
        each = [sums["hinge"] / jnp.maximum(sums["tokens"], 1.0) for *_, sums in leaves(stats)]
        return jnp.mean(jnp.concatenate(each))
