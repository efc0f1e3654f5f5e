"""LoRAMoE's localized balancing constraint: two groups of experts for two types of task (arXiv 2312.09979).

    Q[m, n] = sum over tokens t of example m of g_n(x_t)
    I[m, n] = 1 + delta  where the type of expert n is the type of example m, else 1 - delta
    Z = I Q,     l = var(Z) / mean(Z)^2  (the code) | var(Z) / mean(Z)  (the paper),  over all M E entries, unbiased

One value a router, summed over routers. Examples of the tasks in `world` (world knowledge) have the type of the first
half of the experts (rounded down), all others that of the second.

Direction: l is least where Z is constant, Q proportional to 1 / I. So an example's *matching* half gets the lower
gates, (1 - delta) / E each against (1 + delta) / E: by default it is the second half that serves `world` more (measured
in the tests). `invert_type=True` swaps the halves. M examples, N segments a row, E experts.
"""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from molora_jax.config.resolve import split_commas
from molora_jax.core.routing import permitted
from molora_jax.errors import InputError
from molora_jax.losses.base import Loss, leaves


@dataclasses.dataclass(frozen=True)
class LocalizedBalance(Loss):
    """`per_token` divides Q by the example's length: without it (as published) unequal lengths alone are a variance.

    The variance is over the examples of a whole global batch; with `accumulate="micro"`, of a micro-step, and averaged.
    """

    weight: float = 0.1
    delta: float = 0.1
    world: str = "factbook"  # task names, by commas
    variant: Literal["code", "paper"] = "code"
    invert_type: bool = False
    per_token: bool = False

    TASKS: ClassVar = ("world",)  # options that name tasks
    LIMITS: ClassVar = {"delta": (0.0, 0.99)}

    def stats(self, routing, ctx):
        """`Q [B, N, E]`, `factor [B, N, E]` (I, 0 where there is no entry), `tokens [B, N]`."""
        if ctx.route == "apart":
            raise InputError(
                "schedule, route", got="'apart' beside the loss localized_balance", expected="'' or 'task'",
                fix="Where a token has one expert to choose there is nothing to localise.",
            )  # fmt: skip
        names = split_commas(self.world)
        world = jnp.array([i for i, task in enumerate(ctx.tasks) if task in names], jnp.int32)
        hot = jax.nn.one_hot(ctx.segment_ids - 1, ctx.max_segments)  # padding (-1) is all zero
        valid = routing.valid.astype(jnp.float32)
        tokens = jnp.einsum("bsn,bs->bn", hot, valid)
        is_world = jnp.any(ctx.task_ids[..., None] == world, axis=-1)
        is_world = jnp.einsum("bsn,bs->bn", hot, valid * is_world) > 0  # an example has one task
        open_ = jnp.ones(routing.gates.shape[-1], bool) & permitted(ctx.allowed)
        first = jnp.cumsum(open_, axis=-1) <= jnp.sum(open_, axis=-1, keepdims=True) // 2  # half of those permitted
        match = (is_world[..., None] == first) != self.invert_type
        there = (tokens > 0)[..., None] & open_
        return {
            "Q": jnp.einsum("bsn,bse->bne", hot, jnp.where(routing.valid[..., None], routing.gates, 0.0)),
            "factor": jnp.where(there, jnp.where(match, 1 + self.delta, 1 - self.delta), 0.0),
            "tokens": tokens,
        }

    def join(self, stacked):
        return self.side_by_side(stacked)

    def value(self, stats):
        values = [jax.vmap(self._spread)(s["Q"], s["factor"], s["tokens"]) for *_, s in leaves(stats)]
        return jnp.sum(jnp.concatenate(values))

    def _spread(self, Q, factor, tokens):
        """One router's value; 0 with fewer than two entries."""
        there = factor > 0
        count = jnp.sum(there)
        Z = factor * (Q / jnp.maximum(tokens, 1.0)[..., None] if self.per_token else Q)
        mean = jnp.sum(Z) / jnp.maximum(count, 1)
        variance = jnp.sum(jnp.where(there, (Z - mean) ** 2, 0.0)) / jnp.maximum(count - 1, 1)
        whole = mean**2 + 1e-10 if self.variant == "code" else jnp.where(mean > 0, mean, 1.0)
        return jnp.where(count > 1, variance / whole, 0.0)
