"""`preference`: the chosen answer before the rejected one (Bradley and Terry), by a reward head or by DPO.

    loss = mean over pairs of softplus(-(s_chosen - s_rejected))
    reward   s = w . hidden at the answer's last token
    dpo      s = beta (log p(answer | prompt) - log p_ref(answer | prompt))      Rafailov et al. 2023, arXiv 2305.18290

`reference="none"` leaves the second term out, "base" is the base without adapters, "start" the run as it started. Rows
2i and 2i + 1 hold the chosen and the rejected answers of the same pairs, in the same segments. G pairs a row at most.
"""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from molora_jax.core.types import Array
from molora_jax.errors import InputError
from molora_jax.objectives.base import Objective
from molora_jax.objectives.lm import token_nll


@dataclasses.dataclass(frozen=True)
class Preference(Objective):
    UNIT: ClassVar[int] = 2
    READS: ClassVar[str] = "pair"
    LIMITS: ClassVar = {"beta": (1e-6, 1e3)}

    form: Literal["reward", "dpo"] = "reward"
    beta: float = 0.1
    reference: Literal["none", "base", "start"] = "none"

    @property
    def needs_tokens(self):
        return self.form == "dpo"

    def check(self, where):
        if self.form == "reward" and self.reference != "none":
            raise InputError(
                f"{where}.reference", got=repr(self.reference), expected="'none' with form 'reward'",
                fix="A reward head has no reference: leave it out, or set form='dpo'.",
            )  # fmt: skip

    def frozen(self):
        return {} if self.reference == "none" else {"reference": self.reference}

    def init_heads(self, key, width, classes):
        return {"kernel": 0.02 * jax.random.normal(key, (width,))} if self.form == "reward" else {}

    def norm(self, batch):
        """Pairs in the batch: segments are numbered from 1 in every row."""
        return jnp.maximum(jnp.sum(jnp.max(_sides(batch["segment_ids"])[0], axis=1)), 1).astype(jnp.float32)

    def loss(self, forward, heads, fixed, batch, norm):
        difference, present = self.differences(forward, heads, fixed, batch)
        over_pairs = lambda x: jnp.sum(jnp.where(present, x, 0.0)) / norm  # noqa: E731
        loss = over_pairs(jax.nn.softplus(-difference))
        return loss, {
            "preference_loss": loss, "accuracy": over_pairs(_right(difference)), "margin": over_pairs(difference),
        }  # fmt: skip

    def score(self, forward, heads, fixed, batch):
        difference, present = self.differences(forward, heads, fixed, batch)
        last, _ = _last(batch, self._most(forward, batch))
        spread = lambda x: jnp.stack([x, jnp.zeros_like(x)], axis=1).reshape(-1, x.shape[-1])  # noqa: E731
        nll = jnp.where(present, jax.nn.softplus(-difference), 0.0)
        return spread(nll), spread(present.astype(jnp.float32)), spread(_right(difference)), last

    def differences(self, forward, heads, fixed, batch):
        """`(s_chosen - s_rejected, present)`, each `[B/2, G]`."""
        last, present = _last(batch, self._most(forward, batch))
        with jax.named_scope("loss"):
            chosen, rejected = _sides(self.scores(forward, heads, fixed, batch, last))
        return chosen - rejected, _sides(present)[0]

    def scores(self, forward, heads, fixed, batch, last):
        """`s [B, G]` of every answer; `last [B, G]` is the position of its last token."""
        hidden = forward.hidden(batch)
        if self.form == "reward":
            return jnp.take_along_axis(hidden.astype(jnp.float32), last[..., None], axis=1) @ heads["kernel"]
        most = self._most(forward, batch)
        s = _log_likelihood(forward, forward.params, forward.model, hidden, batch, most)
        if "reference" in fixed:
            other = fixed["reference"]
            s = s - _log_likelihood(forward, other.params, other.model, forward.frozen(other, batch), batch, most)
        return self.beta * s

    def rewards(self, forward, heads, fixed, batch):
        """`(s [B, G], whether there is such an answer [B, G])` of rows that need not be pairs."""
        last, present = _last(batch, self._most(forward, batch))
        return self.scores(forward, heads, fixed, batch, last), present

    @staticmethod
    def _most(forward, batch):
        return forward.model.max_segments or batch["tokens"].shape[1]


def _sides(x: Array) -> tuple[Array, Array]:
    """The rows of the chosen and those of the rejected answers, `[B/2, ...]` each."""
    pairs = x.reshape(-1, 2, *x.shape[1:])
    return pairs[:, 0], pairs[:, 1]


def _right(difference: Array) -> Array:
    """1 where the chosen answer is before, 1/2 at a draw (an untrained model against itself), else 0."""
    difference = jax.lax.stop_gradient(difference)
    return jnp.where(difference > 0, 1.0, jnp.where(difference == 0, 0.5, 0.0))


def _members(segments: Array, most: int) -> Array:
    """`[B, G, N]` bool: which of the places `segments [B, N]` belong to each example of a row."""
    return segments[:, None, :] == jnp.arange(1, most + 1)[None, :, None]


def _last(batch, most: int):
    """`(position of each example's last token, whether there is one)`, both `[B, G]`."""
    own = _members(batch["segment_ids"], most)
    at = jnp.max(jnp.where(own, jnp.arange(own.shape[-1]), -1), axis=-1)
    return jnp.maximum(at, 0), at >= 0


def _log_likelihood(forward, params, model, hidden, batch, most: int) -> Array:
    """Of each answer, summed over its tokens: `[B, G]`."""
    nll, weight, _, places = token_nll(model, params, hidden, batch, forward.targets_per_row)
    segment = jnp.take_along_axis(batch["segment_ids"], places, axis=1)
    return -jnp.sum(jnp.where(_members(segment, most), (nll * weight)[:, None, :], 0.0), axis=-1)
