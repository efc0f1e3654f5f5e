"""MeteoRA's gate loss: every gate tells the task of every token, as a class (arXiv 2405.13053, section 3.3).

    l = mean over gates and tokens of -log softmax(z)_y,    y the expert of the token's task,  z the gate's logits

One mean over all gates of all layers, each token of each gate alike; tokens of prompts count too. Padding has no label,
nor has a task without an expert. A packed example's last token is predicted and never an input, so all its positions
have one label: the published shift by one (z at t, the label of t + 1) is the same inside an example, and none of ours
takes the label of the next example in its row. B batch, S sequence, E experts.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from molora_jax.config.resolve import split_commas
from molora_jax.core.routing import NEG_INF, permitted
from molora_jax.errors import InputError
from molora_jax.losses.base import Loss, leaves


@dataclasses.dataclass(frozen=True)
class TaskLabel(Loss):
    """`tasks`: those of expert 0, 1, ..., entries of data.tasks, by commas; tasks not named have no label. "" is the
    task's place in data.tasks modulo E, as `schedule.sNN.route="task"` trains experts.
    """

    weight: float = 50.0
    tasks: str = ""

    TASKS: ClassVar = ("tasks",)  # options that name tasks

    def stats(self, routing, ctx):
        """`nll`, `tokens`: sums over the tokens with a label; none in a stage that routes by task itself."""
        label = self._labels(ctx, routing.logits.shape[-1])
        mask = permitted(ctx.allowed)
        open_ = jnp.ones(routing.logits.shape, bool) & mask
        log_p = jax.nn.log_softmax(jnp.where(open_, routing.logits, NEG_INF), axis=-1)
        at = jnp.clip(label, 0)[..., None]
        there = routing.valid & (label >= 0) & jnp.take_along_axis(open_, at, axis=-1)[..., 0]
        there &= ctx.route != "task"
        nll = -jnp.take_along_axis(log_p, at, axis=-1)[..., 0]
        return {"nll": jnp.sum(jnp.where(there, nll, 0.0)), "tokens": jnp.sum(there, dtype=jnp.float32)}

    def value(self, stats):
        found = [sums for *_, sums in leaves(stats)]
        nll, tokens = (sum(jnp.sum(sums[name]) for sums in found) for name in ("nll", "tokens"))
        return nll / jnp.maximum(tokens, 1.0)

    def _labels(self, ctx, experts: int):
        """`[B, S]` int32, -1 where there is none."""
        names = split_commas(self.tasks)
        if not names:
            return ctx.task_ids % experts
        if len(names) > experts:
            raise InputError(
                "losses.task_label.tasks", got=f"{len(names)} tasks", expected=f"at most {experts}, one an expert",
                fix="Name fewer, or raise the rule's experts.",
            )  # fmt: skip
        expert_of = np.array([names.index(task) if task in names else -1 for task in ctx.tasks] or [-1], np.int32)
        return jnp.asarray(expert_of)[jnp.clip(ctx.task_ids, 0, len(expert_of) - 1)]
