"""One expert for each group of tasks, by the batch's task ids: a decision from outside, of a classifier or of the data.

    g_e = 1 where the token's task is one of `tasks[e]`, else 0

`tasks=("chat,chat.empathy", "code")`: expert 0 has two tasks, expert 1 one; a task that nobody names has no expert, and
the base alone. Without `tasks` expert e has the tasks e, e + E, ... in the order of `data.tasks`. It has no leaves. A
stage's `route="task"` does the latter for one stage, in place of the routers.
E experts.
"""

import dataclasses
from typing import ClassVar, Literal

import jax.numpy as jnp
import numpy as np

from molora_jax.config.resolve import split_commas
from molora_jax.core import routing
from molora_jax.routers.base import Router


@dataclasses.dataclass(frozen=True)
class ByTask(Router):
    """`tasks`: for each expert the names of its tasks, by commas."""

    share: Literal["site", "attn", "ffn", "model"] = "model"
    tasks: tuple = ()

    TASKS: ClassVar[tuple[str, ...]] = ("tasks",)
    COLLAPSES: ClassVar[bool] = False

    def k_max(self, experts):
        return experts

    def init_leaves(self, key, site, layer):
        return {}

    def route(self, p, shared, x, ctx):
        E = ctx.site.experts
        if not self.tasks:
            hot = (ctx.task_ids % E)[..., None] == jnp.arange(E)
        else:
            hot = jnp.asarray(self.table(ctx.tasks, E))[jnp.clip(ctx.task_ids, 0, max(len(ctx.tasks) - 1, 0))]
        gates = hot.astype(jnp.float32)
        z = jnp.where(hot, 0.0, routing.NEG_INF)
        return routing.finish(gates, hot, z, gates, ctx, k_max=self.k_max(E), sums_to_one=True), ctx.carry, {}

    def table(self, names: tuple[str, ...], experts: int) -> np.ndarray:
        """`[tasks, E]` bool."""
        own = [split_commas(group) for group in self.tasks][:experts]
        out = np.zeros((max(len(names), 1), experts), bool)
        for e, group in enumerate(own):
            for task in group:
                if task in names:
                    out[names.index(task), e] = True
        return out
