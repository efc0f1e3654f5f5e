"""What routers charge a token by their own account (`Routing.cost`), as it is or held to a target.

    target = 0:  l = c;      else  l = (c - target)^2,       c = mean over tokens of the router's cost

relu          lambda sum_e f_e g_e, ReMoE's controlled L1: weight 1, target 0
dselect_k     the mean entropy of the selectors: a weight that grows pushes them to decide; target 0
null_experts  the true experts that a token uses, in expectation: target = their budget, say 2.0

One value a router, their mean, over the routers that charge something.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from molora_jax.losses.base import Loss, leaves


@dataclasses.dataclass(frozen=True)
class RouterCost(Loss):
    weight: float = 1.0
    target: float = 0.0

    LIMITS: ClassVar = {"target": (0, None)}
    ROUTERS: ClassVar[tuple[str, ...]] = ("relu", "dselect_k", "null_experts")

    def stats(self, routing, ctx):
        tokens, cost = jnp.sum(routing.valid, dtype=jnp.float32), routing.cost
        charged = jnp.zeros(()) if cost is None else jnp.sum(jnp.where(routing.valid, cost, 0.0))
        return {"cost": charged, "tokens": tokens, "charges": jnp.float32(cost is not None) * (tokens > 0)}

    def value(self, stats):
        each = [(s["cost"] / jnp.maximum(s["tokens"], 1.0), s["charges"] > 0) for *_, s in leaves(stats)]
        c, charges = (jnp.concatenate(part) for part in zip(*each, strict=True))
        value = c if not self.target else (c - self.target) ** 2
        return jnp.sum(jnp.where(charges, value, 0.0)) / jnp.maximum(jnp.sum(charges), 1)
