"""Routers of a package outside the tree: experts nearly as probable as the best one."""

import dataclasses
from typing import ClassVar, Literal

import jax.numpy as jnp

from molora_jax.core import routing
from molora_jax.routers.base import Router


@dataclasses.dataclass(frozen=True)
class NearBest(Router):
    """Experts with p_e >= tau max_f p_f; `gates`: their probabilities, or equal weights."""

    tau: float = 0.5
    gates: Literal["probabilities", "equal"] = "probabilities"

    LIMITS: ClassVar = {"tau": (0, 1, "(]")}

    def k_max(self, experts):
        return experts

    def route(self, p, shared, x, ctx):
        z = routing.logits(p["W"], x)
        probs = routing.softmax(z, ctx.allowed)
        best = jnp.max(probs, axis=-1, keepdims=True)
        selected = (probs >= self.tau * best) & routing.permitted(ctx.allowed)
        kept = jnp.where(selected, probs if self.gates == "probabilities" else 1.0, 0.0)
        gates = kept / jnp.sum(kept, axis=-1, keepdims=True)
        decision = routing.finish(gates, selected, z, probs, ctx, k_max=z.shape[-1], sums_to_one=True)
        return decision, ctx.carry, {}
