"""Gradients that keep an example private: DP-SGD (Abadi et al. 2016, arXiv 1607.00133).

    g = (1 / b) ( sum_i g_i min(1, C / ||g_i||) + N(0, sigma^2 C^2 I) )

g_i is one example's gradient of all that trains, as one vector; b the expected number of examples of a step (each is
drawn with probability q = b / n on its own, Poisson sampling); the noise is drawn once a step, for the whole sum.
What sigma, q and the number of steps come to is `accountant.py`.
"""

import dataclasses

import jax
import jax.numpy as jnp

from molora_jax.core.types import Array

NOISE_KEY = 0xD9  # folded into the step's key


@dataclasses.dataclass(frozen=True)
class Private:
    """`clip`: C; `noise`: sigma, in units of C; `batch`: b."""

    clip: float
    noise: float
    batch: float

    def clipped(self, grads: dict, there: Array) -> tuple[dict, Array]:
        """`(sum of the clipped gradients, norms [M])` of `grads [M, ...]`; what is not `there [M]` is no example."""
        norms = jnp.sqrt(
            sum(jnp.sum(g.astype(jnp.float32) ** 2, axis=range(1, g.ndim)) for g in jax.tree.leaves(grads))
        )
        factor = jnp.minimum(1.0, self.clip / jnp.maximum(norms, 1e-12))

        def summed(g):
            wide = (..., *[None] * (g.ndim - 1))
            return jnp.sum(jnp.where(there[wide], g * factor[wide], 0.0), axis=0)

        return jax.tree.map(summed, grads), norms

    def noised(self, total: dict, key: Array) -> dict:
        """The step's gradient from the sum over all examples, which every device sees whole."""
        leaves, tree = jax.tree.flatten(total)
        if self.noise:
            keys = jax.random.split(jax.random.fold_in(key, NOISE_KEY), len(leaves))
            std = self.noise * self.clip
            leaves = [g + std * jax.random.normal(k, g.shape, g.dtype) for g, k in zip(leaves, keys, strict=True)]
        return jax.tree.unflatten(tree, [g / self.batch for g in leaves])
