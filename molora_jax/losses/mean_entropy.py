"""Entropy of the mean probabilities, kept up (LIMoE's global loss, Mustafa et al. 2022, arXiv 2206.02770, eq. 4).

    l = max(0, tau log E - H(P)),    P = mean over the batch's tokens of p

With the `entropy` loss (LIMoE's local one) tokens are sure and experts all used. tau = 1 asks for equal use, where l is
the divergence of P from uniform; below, the router may leave out a part: exp(tau log E) experts are enough. E experts.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from molora_jax.core.routing import permitted
from molora_jax.losses.base import Loss, leaves
from molora_jax.losses.mutual_information import xlogx


@dataclasses.dataclass(frozen=True)
class MeanEntropy(Loss):
    """`tau`: the entropy that is asked for, of the largest possible."""

    weight: float = 1e-2
    tau: float = 1.0

    LIMITS: ClassVar = {"tau": (0, 1)}

    def stats(self, routing, ctx):
        valid = routing.valid[..., None]
        return {
            "prob": jnp.sum(jnp.where(valid, routing.probs, 0.0), axis=(0, 1)),
            "open": jnp.sum(jnp.broadcast_to(valid & permitted(ctx.allowed), routing.probs.shape), axis=(0, 1)),
            "tokens": jnp.sum(routing.valid, dtype=jnp.float32),
        }

    def value(self, stats):
        return jnp.mean(jnp.concatenate([jax.vmap(self._short)(s) for *_, s in leaves(stats)]))

    def _short(self, sums):
        P = sums["prob"] / jnp.maximum(sums["tokens"], 1.0)
        most = jnp.log(jnp.maximum(jnp.sum(sums["open"] > 0), 1).astype(jnp.float32))
        return jnp.where(sums["tokens"] > 0, jax.nn.relu(self.tau * most + jnp.sum(xlogx(P))), 0.0)
