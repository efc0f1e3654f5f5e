"""Entropy of the router (Dynamic MoE, arXiv 2403.07652, eq. 6): -sum_e p_e log p_e, mean over tokens and routers.

Minimised with a positive weight: sharper routers need fewer experts to pass p. Of the full distribution.
"""

import dataclasses

import jax.numpy as jnp

from molora_jax.losses.base import Loss, leaves


@dataclasses.dataclass(frozen=True)
class Entropy(Loss):
    weight: float = 1e-4

    def stats(self, routing, ctx):
        p = routing.probs
        h = -jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1.0)), 0.0), axis=-1)
        return {"h": jnp.sum(jnp.where(routing.valid, h, 0.0)), "tokens": jnp.sum(routing.valid, dtype=jnp.float32)}

    def value(self, stats):
        return jnp.mean(jnp.concatenate([s["h"] / jnp.maximum(s["tokens"], 1.0) for *_, s in leaves(stats)]))
