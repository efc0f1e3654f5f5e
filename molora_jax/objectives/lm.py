"""`lm`: next-token cross-entropy on answer tokens, logits only where there is a target.

The head is a fifth of SmolLM2's multiply-adds; the packer bounds the targets of a row, so `M` positions a row suffice.
B batch, S sequence, M targets a row, V vocabulary.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from molora_jax.core.types import Array
from molora_jax.objectives.base import Objective, weight_of
from molora_jax.objectives.vocabulary import by_token


def at_targets(batch: dict, targets_per_row: int) -> Array:
    """Positions with a loss, first: `[B, M]` int32. Rows with fewer targets repeat positions of weight 0."""
    none = batch["loss_weight"] <= 0
    return jnp.argsort(none, axis=1, stable=True)[:, :targets_per_row].astype(jnp.int32)


def token_nll(model, params: dict, hidden: Array, batch: dict, targets_per_row: int):
    """`(nll [B, M], weight [B, M], right [B, M] bool, places [B, M])`: `right` is "the target is the argmax"."""
    places = at_targets(batch, targets_per_row)
    pick = lambda x: jnp.take_along_axis(x, places, axis=1)  # noqa: E731
    hidden = jnp.take_along_axis(hidden, places[..., None], axis=1)
    targets, weight = pick(batch["targets"]), pick(batch["loss_weight"])
    with jax.named_scope("loss"):
        nll, right = by_token(nll_of, model, params, hidden, targets)
    return jnp.where(weight > 0, nll, 0.0), weight, right, places


def nll_of(logits_of, hidden: Array, targets: Array):
    """`(nll [B, m], right [B, m])` of a chunk of positions (`vocabulary.by_token`)."""
    logits = logits_of(hidden)
    target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    right = jnp.argmax(jax.lax.stop_gradient(logits), axis=-1) == targets
    return jax.nn.logsumexp(logits, axis=-1) - target, right


def lm(model, params: dict, hidden: Array, batch: dict, targets_per_row: int) -> Array:
    """Weighted sum of negative log-likelihoods (nats); the caller divides by the global batch's weight."""
    nll, weight, _, _ = token_nll(model, params, hidden, batch, targets_per_row)
    return jnp.sum(nll * weight)


@dataclasses.dataclass(frozen=True)
class LM(Objective):
    EXACT: ClassVar[bool] = True

    def norm(self, batch):
        return weight_of(batch)

    def loss(self, forward, heads, fixed, batch, norm):
        hidden = forward.hidden(batch)
        nll = lm(forward.model, forward.params, hidden, batch, forward.targets_per_row) / norm
        return nll, {"lm_loss": nll}

    def score(self, forward, heads, fixed, batch):
        return token_nll(forward.model, forward.params, forward.hidden(batch), batch, forward.targets_per_row)


PLAIN = LM()  # where nothing else is said
