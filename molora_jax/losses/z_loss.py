"""Router z-loss (ST-MoE, Zoph et al. 2022, arXiv 2202.08906, eq. 5): mean over tokens of (log sum_e exp z_e)^2.

Keeps router logits small; mean over routers.
"""

import dataclasses

import jax
import jax.numpy as jnp

from molora_jax.core.routing import NEG_INF, permitted
from molora_jax.losses.base import Loss, leaves


@dataclasses.dataclass(frozen=True)
class ZLoss(Loss):
    weight: float = 1e-3

    def stats(self, routing, ctx):
        z = jnp.where(permitted(ctx.allowed), routing.logits, NEG_INF)  # shut-out and padded experts do not count
        square = jax.nn.logsumexp(z, axis=-1) ** 2
        return {
            "z": jnp.sum(jnp.where(routing.valid, square, 0.0)),
            "tokens": jnp.sum(routing.valid, dtype=jnp.float32),
        }

    def value(self, stats):
        return jnp.mean(jnp.concatenate([s["z"] / jnp.maximum(s["tokens"], 1.0) for *_, s in leaves(stats)]))
