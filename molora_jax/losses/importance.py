"""Importance loss (Shazeer et al. 2017, arXiv 1701.06538, eq. 6, 7): experts get like sums of gates over the batch.

    l = CV(sum_t g_t)^2,    CV^2 = var / (mean^2 + 1e-10), over experts

0 at equal sums, E / K - 1 where all goes to K experts alike. Unlike the balance loss it sees gates, not choices, and
is all gradient. One value a router, their mean. V-MoE's loss is half of this and half of `load` (arXiv 2106.05974).
"""

import dataclasses
from typing import Literal

import jax.numpy as jnp

from molora_jax.losses.base import Loss, leaves


@dataclasses.dataclass(frozen=True)
class Importance(Loss):
    """`variance`: of all experts, as published, or "sample" (over E - 1), as torch's `var`. Experts that nobody may
    choose do not count.
    """

    weight: float = 0.1
    variance: Literal["population", "sample"] = "population"

    def weighed(self, routing):
        """`[B, S, E]`, of which the sums over tokens should be alike; None of a router that has no such thing."""
        return routing.gates

    def stats(self, routing, ctx):
        valid = routing.valid[..., None]
        allowed = True if ctx.allowed is None else ctx.allowed if ctx.allowed.ndim == 1 else ctx.allowed[:, None]
        mine = self.weighed(routing)
        if mine is None:
            return dict.fromkeys(("sum", "open"), jnp.zeros(routing.probs.shape[-1]))
        open_ = jnp.broadcast_to(valid & allowed, mine.shape)
        return {
            "sum": jnp.sum(jnp.where(open_, mine, 0.0), axis=(0, 1)),
            "open": jnp.sum(open_, axis=(0, 1), dtype=jnp.float32),
        }

    def value(self, stats):
        each = [(self._spread(s["sum"], s["open"] > 0), jnp.any(s["open"] > 0, axis=-1)) for *_, s in leaves(stats)]
        value, there = (jnp.concatenate(part) for part in zip(*each, strict=True))
        return jnp.sum(jnp.where(there, value, 0.0)) / jnp.maximum(jnp.sum(there), 1)

    def _spread(self, total, there):
        """`[L]` of `[L, E]`."""
        count = jnp.maximum(jnp.sum(there, axis=-1), 1)
        mean = jnp.sum(jnp.where(there, total, 0.0), axis=-1) / count
        square = jnp.sum(jnp.where(there, (total - mean[..., None]) ** 2, 0.0), axis=-1)
        variance = square / (count if self.variance == "population" else jnp.maximum(count - 1, 1))
        return variance / (mean**2 + 1e-10)
