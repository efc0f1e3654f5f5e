"""Mutual information between tokens, or tasks, and experts, maximised (ModuleFormer 2306.04640, Mod-Squad 2212.08066).

    token:  l = -(H(P) - mean_t H(p_t)),    P = mean_t p_t                      from -log E (sure and balanced) to 0
    task:   l = -sum_{i,e} P(i, e) log( P(i, e) / (P(i) P(e)) ),   P(i, e) = (sum of p_e over the tokens of task i) / T

Balance and sharpness in one: experts are used alike over the batch, each token (or task) by few. P(i) is a task's share
of the tokens. One value a router, their mean, a negative number. T tokens, E experts.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from molora_jax.losses.base import Loss, leaves


def xlogx(p):
    return jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1.0)), 0.0)


@dataclasses.dataclass(frozen=True)
class MutualInformation(Loss):
    """`between`: experts and tokens, or the batch's tasks."""

    weight: float = 1e-3
    between: Literal["token", "task"] = "token"

    def stats(self, routing, ctx):
        """`joint [N, E]`, of N tasks (one where tokens are meant); `own` the sum of p log p; `tokens`."""
        p = jnp.where(routing.valid[..., None], routing.probs, 0.0)
        tasks = max(len(ctx.tasks), 1) if self.between == "task" else 1
        of = ctx.task_ids if self.between == "task" else jnp.zeros_like(ctx.task_ids)
        return {
            "joint": jnp.einsum("bsn,bse->ne", jax.nn.one_hot(of, tasks), p),
            "own": jnp.sum(xlogx(p)),
            "tokens": jnp.sum(routing.valid, dtype=jnp.float32),
        }

    def value(self, stats):
        return jnp.mean(jnp.concatenate([jax.vmap(self._negative)(s) for *_, s in leaves(stats)]))

    def _negative(self, sums):
        tokens = jnp.maximum(sums["tokens"], 1.0)
        joint = sums["joint"] / tokens
        whole = jnp.sum(xlogx(jnp.sum(joint, axis=0)))
        if self.between == "token":
            return whole - sums["own"] / tokens
        return whole + jnp.sum(xlogx(jnp.sum(joint, axis=1))) - jnp.sum(xlogx(joint))
