"""`classify`: cross-entropy of a linear head on one hidden state an example.

    h_e = hidden at the example's last token, or the mean over its tokens;   loss = mean_e -log softmax(W h_e + b)[y_e]

In a batch of labelled rows an example's one target is its class: `targets` holds the class at the last token, where
`loss_weight` is 1. C classes, M examples a row (the packer's bound of targets).
"""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from molora_jax.core.types import Array
from molora_jax.objectives.base import Objective, weight_of
from molora_jax.objectives.lm import at_targets


@dataclasses.dataclass(frozen=True)
class Classify(Objective):
    """`pooling`: "last" for a decoder, whose last token alone has seen all; "mean" for an encoder."""

    READS: ClassVar[str] = "label"
    HEAD: ClassVar[bool] = True

    pooling: Literal["last", "mean"] = "last"

    def init_heads(self, key, width, classes):
        return {"kernel": 0.02 * jax.random.normal(key, (width, classes)), "bias": jnp.zeros(classes)}

    def norm(self, batch):
        return weight_of(batch)

    def loss(self, forward, heads, fixed, batch, norm):
        nll, weight, right, _ = self.score(forward, heads, fixed, batch)
        loss = jnp.sum(nll * weight) / norm
        return loss, {"class_loss": loss, "accuracy": jnp.sum(right * weight) / norm}

    def score(self, forward, heads, fixed, batch):
        places = at_targets(batch, forward.targets_per_row)
        weight, label = (jnp.take_along_axis(batch[name], places, axis=1) for name in ("loss_weight", "targets"))
        label = jnp.where(weight > 0, label, 0)
        with jax.named_scope("loss"):
            logits = self.pooled(forward.hidden(batch), batch, places) @ heads["kernel"] + heads["bias"]
            nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), label[..., None], axis=-1)[..., 0]
            right = jnp.argmax(jax.lax.stop_gradient(logits), axis=-1) == label
        return jnp.where(weight > 0, nll, 0.0), weight, right, places

    def pooled(self, hidden: Array, batch: dict, places: Array) -> Array:
        """`[B, S, D]` -> float32 `[B, M, D]`, of the examples that end at the positions `places [B, M]`."""
        hidden = hidden.astype(jnp.float32)
        if self.pooling == "last":
            return jnp.take_along_axis(hidden, places[..., None], axis=1)
        segment = jnp.take_along_axis(batch["segment_ids"], places, axis=1)
        own = (segment[:, :, None] == batch["segment_ids"][:, None, :]).astype(jnp.float32)  # [B, M, S]
        return jnp.einsum("bms,bsd->bmd", own, hidden) / jnp.sum(own, axis=-1, keepdims=True)
