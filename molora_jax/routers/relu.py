"""ReMoE: ReLU gates, whose number an L1 cost with a controlled weight holds (Wang et al. 2024, arXiv 2412.14711).

    g = relu(W x);    cost = lambda sum_e f_e g_e,   f_e = (E / K) (share of tokens with g_e > 0), no gradient
    lambda <- lambda a^sign(active - K)      once a step; active: experts a token, mean over the batch

Gates are continuous in x, also where an expert joins. The loss `router_cost` (weight 1) brings the cost into the
objective: without it nothing makes gates sparse. `balanced=False` is f = 1, the plain L1. lambda is state. E experts,
K their target.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from molora_jax.core import routing
from molora_jax.routers.base import Router


@dataclasses.dataclass(frozen=True)
class Relu(Router):
    """`start` is lambda's, `factor` a: the paper's, with steps in the thousands. Short runs want a larger start."""

    k: int = 2
    balanced: bool = True
    start: float = 1e-8
    factor: float = 1.2

    LIMITS: ClassVar = {"k": (1, None), "start": (0, None, "()"), "factor": (1, None)}

    def k_max(self, experts):
        return experts

    def init_state(self, site):
        return {"lambda": jnp.float32(self.start)}

    def route(self, p, shared, x, ctx):
        z = routing.logits(p["W"], x)
        mask = jnp.broadcast_to(routing.permitted(ctx.allowed), z.shape)
        gates = jnp.where(mask, jax.nn.relu(z), 0.0)
        E = z.shape[-1]
        decision = routing.finish(gates, gates > 0, z, routing.normalised(gates), ctx, k_max=E)
        count, tokens = routing.counts(decision), jnp.sum(ctx.valid, dtype=jnp.float32)
        experts = jnp.sum(mask, axis=-1, keepdims=True)
        f = experts / self.k * count / jnp.maximum(tokens, 1.0) if self.balanced else 1.0
        cost = ctx.state["lambda"] * jnp.sum(jax.lax.stop_gradient(f) * decision.gates, axis=-1)
        return decision.replace(cost=cost), ctx.carry, {"count": count, "tokens": tokens}

    def update(self, state, sums):
        active = jnp.sum(sums["count"]) / jnp.maximum(sums["tokens"], 1.0)
        return {"lambda": state["lambda"] * self.factor ** jnp.sign(active - self.k)}
