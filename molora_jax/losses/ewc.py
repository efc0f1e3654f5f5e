"""Elastic weight consolidation (Kirkpatrick et al. 2017, arXiv 1612.00796, eq. 3): what earlier tasks need stays put.

    L(theta) = L_task(theta) + weight * 1/2 sum_j F_j (theta_j - a_j)^2

F_j is the diagonal of the empirical Fisher information, the mean over a task's training examples of the squared
gradient of the loss; the tasks' penalties are summed. A sum of parabolas is one parabola and a constant: with
F = sum_i F_i and a = sum_i F_i theta_i / F it has the same slope, and nothing grows with the tasks.
"""

import dataclasses

import jax
import jax.numpy as jnp

from molora_jax.losses.base import Penalty


@dataclasses.dataclass(frozen=True)
class Ewc(Penalty):
    weight: float = 1.0

    def fresh(self, trainable):
        return {"fisher": jax.tree.map(jnp.zeros_like, trainable), "anchor": jax.tree.map(jnp.zeros_like, trainable)}

    def penalty(self, trainable, memory):
        terms = jax.tree.map(lambda F, x, a: jnp.sum(F * (x - a) ** 2), memory["fisher"], trainable, memory["anchor"])
        return 0.5 * sum(jax.tree.leaves(terms))

    def remember(self, memory, trainable, squares):
        fisher = jax.tree.map(jnp.add, memory["fisher"], squares)
        part = jax.tree.map(lambda own, F: own / jnp.where(F > 0, F, 1.0), squares, fisher)
        anchor = jax.tree.map(lambda a, x, s: a + s * (x - a), memory["anchor"], trainable, part)
        return {"fisher": fisher, "anchor": anchor}
