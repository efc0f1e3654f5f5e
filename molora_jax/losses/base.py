"""The contract of a routing loss. A loss is a frozen dataclass of its config.

`stats(routing, ctx) -> sums` runs inside the layer scan on one router's decision; the sums leave it as
`[layers, ...]`. `value(stats) -> scalar` runs once at the end on `{rule: {segment: {scope: sums}}}`.
"""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from molora_jax.core.types import Array, Context, Routing
from molora_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Loss:
    """`accumulate`: with `train.accumulate` > 1, `micro` is the mean of the micro-steps' values, `exact` the value of
    the whole batch's sums (one more forward pass). They differ, since a loss is rarely linear in its sums.
    """

    weight: float = 1e-2
    accumulate: Literal["micro", "exact"] = dataclasses.field(default="micro", kw_only=True)

    LIMITS: ClassVar = {"weight": (0, None)}
    ROUTERS: ClassVar[tuple[str, ...]] = ()  # of a loss that reads what these alone say (`Routing.sparsity`)

    def stats(self, routing: Routing, ctx: Context) -> dict[str, Array]:
        raise NotImplementedError

    def join(self, stacked: dict) -> dict:
        """The sums of several micro-steps, `[micro-steps, layers, ...]`, as those of the whole batch."""
        return jax.tree.map(lambda x: jnp.sum(x, axis=0), stacked)

    @staticmethod
    def side_by_side(stacked: dict) -> dict:
        """`join` for sums by row, `[micro-steps, layers, rows, ...]`: micro-steps hold other rows."""
        return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(x.shape[1], -1, *x.shape[3:]), stacked)

    def value(self, stats: dict) -> Array:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Penalty(Loss):
    """On the trainable leaves, not on routing, given what the run remembers (a regime with `PENALTY` keeps it).

    One that remembers nothing says `PENALTY = False` and serves under every regime: its `memory` is empty. One whose
    `remember` reads no gradients says `SQUARES = False` (it is given {}), and serves between stages too.
    """

    ROUTING: ClassVar[bool] = False
    PENALTY: ClassVar[bool] = True
    SQUARES: ClassVar[bool] = True

    def stats(self, routing, ctx):
        return {}

    def value(self, stats):
        return jnp.zeros(())

    def fresh(self, trainable: dict) -> dict:
        """What is remembered before anything was learnt; traceable."""
        raise NotImplementedError

    def penalty(self, trainable: dict, memory: dict) -> Array:
        raise NotImplementedError

    def remember(self, memory: dict, trainable: dict, squares: dict) -> dict:
        """The memory after a task; traceable. squares: the mean of the squared gradients of single examples."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class OfLeaves(Penalty):
    """A penalty on the leaves as they are, which remembers nothing."""

    PENALTY: ClassVar[bool] = False

    def fresh(self, trainable):
        return {}

    def remember(self, memory, trainable, squares):
        return {}


def value_of(loss: Loss, stats: dict, where: str) -> Array:
    """`loss.value(stats)`.

    Raises:
      InputError: in the name of `where`: no scalar.
    """
    value = loss.value(stats)
    shape = getattr(value, "shape", () if isinstance(value, (int, float)) else None)
    if shape != ():
        got = f"a {type(value).__name__}" if shape is None else f"shape {shape}"
        raise InputError(
            where, got=f"{type(loss).__name__}.value, which gave {got}", expected="a scalar",
            fix="Return one number for all layers and routers: their mean, say.",
        )  # fmt: skip
    return value


def leaves(stats: dict):
    """Every router's sums: `(rule, segment, scope, sums)`, sums leading with the segment's layers."""
    for rule, segments in stats.items():
        for segment, scopes in segments.items():
            for scope, sums in scopes.items():
                yield rule, segment, scope, sums
