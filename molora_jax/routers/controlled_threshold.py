"""Experts above a probability that a PI controller leads to a mean number of experts a token.

    p = softmax(W x),   S = the e with p_e >= tau, and the largest,   g_e = p_e / sum_S p
    tau <- tau + kp (d - d') + ki d,   d = experts a token in the batch - K, d' that of the step before     once a step

tau is state, without a gradient: it holds the budget, the router what it is spent on. It starts at 1 / E, and does not
move in evaluation. E experts, K their target.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from molora_jax.core import routing
from molora_jax.routers.base import Router


@dataclasses.dataclass(frozen=True)
class ControlledThreshold(Router):
    """`kp`, `ki`: the gains, of thresholds in [0, 1] and an error in experts."""

    k: float = 2.0
    kp: float = 0.01
    ki: float = 0.002

    LIMITS: ClassVar = {"k": (1, None), "kp": (0, None), "ki": (0, None)}

    def k_max(self, experts):
        return experts

    def init_state(self, site):
        return {"tau": jnp.float32(1 / site.experts), "error": jnp.float32(0)}

    def route(self, p, shared, x, ctx):
        z = routing.logits(p["W"], x)
        probs = routing.softmax(z, ctx.allowed)
        best = routing.top_k(jnp.where(routing.permitted(ctx.allowed), z, routing.NEG_INF), 1)
        selected = ((probs >= ctx.state["tau"]) | best) & routing.permitted(ctx.allowed)
        gates = routing.normalised(jnp.where(selected, probs, 0.0))
        decision = routing.finish(gates, selected, z, probs, ctx, k_max=z.shape[-1], sums_to_one=True)
        sums = {"count": routing.counts(decision), "tokens": jnp.sum(ctx.valid, dtype=jnp.float32)}
        return decision, ctx.carry, sums

    def update(self, state, sums):
        error = jnp.sum(sums["count"]) / jnp.maximum(sums["tokens"], 1.0) - self.k
        moved = state["tau"] + self.kp * (error - state["error"]) + self.ki * error
        return {"tau": jnp.clip(moved, 0.0, 1.0), "error": error}
