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
        open_ = jnp.ones(routing.logits.shape, bool) & permitted(ctx.allowed)
        there = jnp.any(open_, axis=-1, keepdims=True)  # the square of NEG_INF is infinite
        z = jnp.where(open_, routing.logits, jnp.where(there, NEG_INF, 0.0))  # shut-out experts do not count
        if routing.base_logit is not None:
            z = jnp.concatenate([jnp.where(open_, routing.logits, NEG_INF), routing.base_logit[..., None]], axis=-1)
            there = jnp.ones_like(there)
        square = jnp.where(there[..., 0], jax.nn.logsumexp(z, axis=-1) ** 2, 0.0)
        return {
            "z": jnp.sum(jnp.where(routing.valid, square, 0.0)),
            "tokens": jnp.sum(routing.valid, dtype=jnp.float32),
        }

    def value(self, stats):
        return jnp.mean(jnp.concatenate([s["z"] / jnp.maximum(s["tokens"], 1.0) for *_, s in leaves(stats)]))
