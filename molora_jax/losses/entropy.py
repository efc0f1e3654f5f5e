"""Entropy of the router (Dynamic MoE, arXiv 2403.07652, eq. 6): -sum_e p_e log p_e, mean over tokens and routers.

Minimised with a positive weight: sharper routers need fewer experts to pass p. Of the full distribution.
`kind="tsallis" | "renyi"` is DynMoLE's (arXiv 2504.00661): normalised to [0, 1], of index q (`core/entropy.py`).
"""

import dataclasses
from typing import ClassVar, Literal

import jax.numpy as jnp

from molora_jax.core import entropy
from molora_jax.losses.base import Loss, leaves


@dataclasses.dataclass(frozen=True)
class Entropy(Loss):
    weight: float = 1e-4
    kind: Literal["shannon", "tsallis", "renyi"] = "shannon"
    q: float = 1.1
    eps: float = 1e-5

    LIMITS: ClassVar = {"q": (0.01, 2.0), "eps": (0.0, 1.0)}

    def stats(self, routing, ctx):
        p = routing.probs
        if self.kind == "shannon":
            h = -jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1.0)), 0.0), axis=-1)
        else:
            h = entropy.normalised(p, kind=self.kind, q=self.q, eps=self.eps, allowed=ctx.allowed)
        return {"h": jnp.sum(jnp.where(routing.valid, h, 0.0)), "tokens": jnp.sum(routing.valid, dtype=jnp.float32)}

    def value(self, stats):
        return jnp.mean(jnp.concatenate([s["h"] / jnp.maximum(s["tokens"], 1.0) for *_, s in leaves(stats)]))
