"""The objective contract: how a batch becomes a loss, and what is measured on held-out rows.

    norm(batch)                                  what the loss is divided by: of the whole batch, without parameters
    loss(forward, heads, fixed, batch, norm)     of a micro-step; the sum over micro-steps is the batch's loss
    score(forward, heads, fixed, batch)          held out, an example at a time

B batch, S sequence, D width, M targets a row, G examples a row, C classes, V vocabulary.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp

from molora_jax.core.types import Array


@flax.struct.dataclass
class Frozen:
    """A model that does not train, with its arrays: a teacher, a reference."""

    params: dict
    adapters: dict
    router_state: dict
    model: Any = flax.struct.field(pytree_node=False)

    def logits(self, hidden: Array) -> Array:
        return self.model.logits(self.params, hidden)


@dataclasses.dataclass
class Forward:
    """The model that trains, as an objective sees it.

    `hidden(batch) -> [B, S, D]` is its pass, made once a micro-step (dropout and the routers' sums belong to it);
    `params` are the base's with the trained copies in their places; `targets_per_row` is the packer's bound M.
    """

    model: Any
    params: dict
    hidden: Callable[[dict], Array]
    targets_per_row: int
    constrain: Callable = lambda x: x

    def logits(self, hidden: Array) -> Array:
        """`[..., D]` -> `[..., V]` float32."""
        return self.model.logits(self.params, hidden)

    def frozen(self, other: Frozen, batch: dict) -> Array:
        """Hidden states `[B, S, D]` of a frozen model on the same rows; nothing is differentiated."""
        params, adapters, state = jax.lax.stop_gradient((other.params, other.adapters, other.router_state))
        return other.model.hidden(params, adapters, state, batch, constrain=self.constrain)[0]


@dataclasses.dataclass(frozen=True)
class Objective:
    """Options are the dataclass fields of a member, values of `config.objective`.

    `UNIT` consecutive rows belong together: neither micro-steps nor processes nor devices tear them. `READS` are the
    rows that it learns from: "text" (answers), "label" (a text and its class), "pair" (a chosen and a rejected answer,
    in rows 2i and 2i + 1). `EXACT`: whether `train.exact` computes it. `HEAD`: whether it trains a head, whatever its
    options.
    """

    UNIT: ClassVar[int] = 1
    READS: ClassVar[str] = "text"
    EXACT: ClassVar[bool] = False
    HEAD: ClassVar[bool] = False

    @property
    def needs_tokens(self) -> bool:
        """Whether it asks the base for a distribution over the next token, which an encoder has not."""
        return self.READS == "text"

    def check(self, where: str) -> None:
        """Raises InputError for options that exclude each other."""

    def frozen(self) -> dict[str, str]:
        """The frozen models that `fixed` must hold: name -> "base" (without adapters), "start" (of the run), or a
        source: a run's folder, or a base source."""
        return {}

    def init_heads(self, key: Array, width: int, classes: int) -> dict:
        """Fresh leaves of the trained head, float32, by name; {} for none. Traceable."""
        return {}

    def norm(self, batch: dict) -> Array:
        raise NotImplementedError

    def loss(self, forward: Forward, heads: dict, fixed: dict[str, Frozen], batch: dict, norm: Array):
        """`(scalar, metrics)`: parts of the whole batch's, so that micro-steps add up."""
        raise NotImplementedError

    def score(self, forward: Forward, heads: dict, fixed: dict[str, Frozen], batch: dict):
        """`(nll, weight, right, places)`, each `[B, N]` for N places a row: nats, what counts (0: no place), whether
        the answer is the right one (0 to 1), and a position inside the example that it belongs to."""
        raise NotImplementedError


def weight_of(batch: dict) -> Array:
    """The sum of the loss weights, at least 1."""
    return jnp.maximum(jnp.sum(batch["loss_weight"]), 1.0)
