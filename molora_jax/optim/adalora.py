"""AdaLoRA's budget (Zhang et al. 2023, arXiv 2303.10512): AdamW, after which the least important triplets are set to 0.

    I = |p dp|,   I~ <- beta1 I~ + (1 - beta1) I,   U <- beta2 U + (1 - beta2) |I - I~|        of A, B and lam
    score_i = (I~ U)(lam_i) + mean (I~ U)(A_i) + mean (I~ U)(B_i)
    b(t) = b0 until t_i;   floor((b0 - bT) (1 - (t - t_i) / (T - t_f - t_i))^3 + bT);   bT from T - t_f on

After step t the b0 - b(t) triplets of the lowest score have lam = 0: of all layers, sites and experts of all rules
together (b0 = initial rank, bT = `target`, times the matrices; every expert has its own). Only every `every`-th step
does so before T - t_f; what was set to 0 still has its gradient and may come back. From T - t_f on scores stay and with
them the choice. Equal scores are told apart by |lam|. T is `train.steps`, t_i and t_f are fractions of it: the schedule
fits any budget, and counts the run's steps. p is as the optimizer left it, dp the step's (clipped) gradient: peft's
order, and its arithmetic, where a step is counted from 1.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from molora_jax.core.trees import triplets
from molora_jax.errors import InputError
from molora_jax.optim.adamw import AdamW


class Budgeted(NamedTuple):
    """`step`: of the run (`training.step.at_step`). `sensitivity`, `uncertainty`: I~ and U of the triplets' leaves."""

    step: optax.ScaleByScheduleState
    moments: Any
    sensitivity: dict
    uncertainty: dict


@dataclasses.dataclass(frozen=True)
class AdaLoraOptimizer(AdamW):
    """`target`: the mean rank in the end. `initial_fraction`, `final_fraction`: t_i / T and t_f / T. `every`: steps
    between two choices. `beta1`, `beta2`: of I~ and U."""

    target: int = 8
    initial_fraction: float = 0.1
    final_fraction: float = 0.3
    every: int = 1
    beta1: float = 0.85
    beta2: float = 0.85

    LIMITS: ClassVar = {
        "target": (1, None), "initial_fraction": (0, 1, "[)"), "final_fraction": (0, 1, "[)"), "every": (1, None),
        "beta1": (0, 1, "()"), "beta2": (0, 1, "()"),
    }  # fmt: skip

    def make(self, total_steps, pairs):
        if self.initial_fraction + self.final_fraction >= 1:
            raise InputError(
                "optim.final_fraction", got=f"{self.initial_fraction} + {self.final_fraction} of the steps",
                expected="initial_fraction + final_fraction < 1", fix="The budget falls in between.",
            )  # fmt: skip
        inner = super().make(total_steps, pairs)
        end = total_steps - int(self.final_fraction * total_steps)

        def init(params):
            flat = flatten_dict(params, sep="/")
            zeros = {path: jnp.zeros_like(flat[path]) for triplet in self._own(flat) for path in triplet}
            zeros = unflatten_dict(zeros, sep="/")
            step = optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))
            return Budgeted(step, inner.init(params), zeros, jax.tree.map(jnp.copy, zeros))

        def update(grads, state, params):
            updates, moments = inner.update(grads, state.moments, params)
            flat, moved, dp = (flatten_dict(tree, sep="/") for tree in (params, updates, grads))
            mean, spread = (flatten_dict(tree, sep="/") for tree in (state.sensitivity, state.uncertainty))
            own, t = self._own(flat), state.step.count + 1
            for path in mean:
                now = jnp.abs((flat[path] + moved[path]) * dp[path])
                smooth = self.beta1 * mean[path] + (1 - self.beta1) * now
                around = self.beta2 * spread[path] + (1 - self.beta2) * jnp.abs(now - smooth)
                mean[path] = jnp.where(t < end, smooth, mean[path])
                spread[path] = jnp.where(t < end, around, spread[path])
            score = {path: mean[path] * spread[path] for path in mean}
            scores = [score[lam] + jnp.mean(score[A], -1) + jnp.mean(score[B], -1) for A, B, lam in own]
            before = [flat[lam] for *_, lam in own]
            fallen = jnp.asarray(self.fallen(total_steps, [x.shape for x in before]))[jnp.clip(t, 0, total_steps)]
            for (*_, lam), gone in zip(own, lowest(scores, before, fallen), strict=True):
                moved[lam] = jnp.where(gone, -flat[lam], moved[lam])
            step = optax.ScaleByScheduleState(state.step.count + 1)
            trees = (unflatten_dict(tree, sep="/") for tree in (mean, spread))
            return unflatten_dict(moved, sep="/"), Budgeted(step, moments, *trees)

        return optax.GradientTransformation(init, update)

    def _own(self, flat):
        """The paths `(A, B, lam)` of every triplet's leaves.

        Raises:
          InputError: there is none, or a rank below the target.
        """
        found = triplets(flat)
        if not found:
            raise InputError(
                "optim.name", got="'adalora' where no A, B and lam train together",
                expected="a rule whose adapter is adalora", fix="Choose that adapter, or adamw.",
            )  # fmt: skip
        for *_, lam in found:
            if flat[lam].shape[-1] < self.target:
                raise InputError(
                    "optim.target", got=str(self.target), fix="Lower it, or raise adapter.rank.",
                    expected=f"at most the initial rank, {flat[lam].shape[-1]} of {lam.rpartition('/')[0]}",
                )  # fmt: skip
        return found

    def fallen(self, total_steps: int, shapes) -> np.ndarray:
        """b0 - b(t) for t from 0 to `total_steps`, where a choice is made, else 0; int32. `shapes [..., R]` of lam."""
        b0 = sum(int(np.prod(shape)) for shape in shapes)
        bT = sum(self.target * int(np.prod(shape[:-1])) for shape in shapes)
        first = int(self.initial_fraction * total_steps)
        end = total_steps - int(self.final_fraction * total_steps)
        t = np.arange(total_steps + 1)
        left = 1 - (np.minimum(t, end) - first) / (end - first)
        budget = np.floor((b0 - bT) * left**3 + bT)
        chooses = (t >= end) | (t > first) & (t % self.every == 0)
        return np.where(chooses, b0 - budget, 0).astype(np.int32)


def lowest(scores: list, before: list, count) -> list:
    """The `count` entries of the lowest score as masks in the scores' shapes; ties by the smaller |lam|, `before`."""
    flat = lambda leaves: jnp.concatenate([x.reshape(-1) for x in leaves])  # noqa: E731
    order = jnp.lexsort((jnp.abs(flat(before)), flat(scores)))
    gone = jnp.argsort(order) < count  # the place of each in that order
    ends = np.cumsum([x.size for x in scores])[:-1]
    return [part.reshape(x.shape) for part, x in zip(jnp.split(gone, ends), scores, strict=True)]
