"""A gate for each task: multi-gate mixture of experts (MMoE, Ma et al. 2018), by the batch's task ids.

    input:  g = softmax(W_t x), a matrix a task t, all experts;      id:  g = softmax(c_t), x has no say
    k > 0 keeps the k largest, renormalised

Where a batch names no tasks (a prompt) the logits are the mean over the tasks. N `tasks` have gates, as many as
`data.tasks` names at most. D width, E experts.
"""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from molora_jax.core import routing
from molora_jax.errors import InputError
from molora_jax.routers.softmax_topk import SoftmaxTopK


@dataclasses.dataclass(frozen=True)
class TaskGate(SoftmaxTopK):
    """`tasks` is N. Raises InputError where the run has more tasks than that."""

    k: int = 0
    on: Literal["input", "id"] = "input"
    tasks: int = 16

    LIMITS: ClassVar = {"tasks": (1, None)}
    COLLAPSES: ClassVar[bool] = False

    def check(self, where, experts, tasks):
        if len(tasks) > self.tasks:
            raise InputError(
                f"{where}.tasks", got=f"{self.tasks} gates for {len(tasks)} tasks", expected=f"at least {len(tasks)}",
                fix=f"Set {where}.tasks={len(tasks)}.",
            )  # fmt: skip

    def init_leaves(self, key, site, layer):
        if self.on == "id":
            return {"c": 0.02 * jax.random.normal(key, (self.tasks, site.experts))}
        W = super().init_leaves(key, dataclasses.replace(site, experts=self.tasks * site.experts), layer)["W"]
        return {"W": W.reshape(self.tasks, site.experts, site.d_in)}

    def logits(self, p, x, ctx):
        among = jnp.arange(self.tasks) < (len(ctx.tasks) or self.tasks)
        share = jax.nn.one_hot(ctx.task_ids, self.tasks) if ctx.tasked else among / jnp.sum(among)
        share = jnp.broadcast_to(share, (*x.shape[:-1], self.tasks))
        if self.on == "id":
            return routing.exact("bsn,ne->bse", share, p["c"])
        z = routing.exact("bsd,ned->bsne", x.astype(jnp.float32), p["W"])
        return routing.exact("bsn,bsne->bse", share, z)
