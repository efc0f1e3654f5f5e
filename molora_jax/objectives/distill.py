"""`distill`: the forward KL from a teacher's next-token distribution, on answer tokens (Hinton et al., 1503.02531).

    loss = T^2 mean over answer tokens of sum_v p_v (log p_v - log q_v),   p, q = softmax(logits / T), p the teacher's

The teacher's logits come from a forward pass of it in the same step; nothing is stored. Held-out rows are measured as
`lm` measures them, so that evaluation needs no teacher.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from molora_jax.errors import InputError
from molora_jax.objectives.base import Objective, weight_of
from molora_jax.objectives.lm import at_targets, token_nll
from molora_jax.objectives.vocabulary import by_token


@dataclasses.dataclass(frozen=True)
class Distill(Objective):
    """`teacher`: a run's folder, or a base source such as "hf:ORG/NAME"; `temperature`: T."""

    PATHS: ClassVar = ("teacher",)
    LIMITS: ClassVar = {"temperature": (0.01, 100.0)}

    teacher: str = ""
    temperature: float = 1.0

    def check(self, where):
        if not self.teacher:
            raise InputError(
                f"{where}.teacher", got="''", expected="a run's folder, or a base source", fix="Name the teacher."
            )

    def frozen(self):
        return {"teacher": self.teacher}

    def norm(self, batch):
        return weight_of(batch)

    def loss(self, forward, heads, fixed, batch, norm):
        teacher, places = fixed["teacher"], at_targets(batch, forward.targets_per_row)
        pick = lambda hidden: jnp.take_along_axis(hidden, places[..., None], axis=1)  # noqa: E731
        own, theirs = pick(forward.hidden(batch)), pick(forward.frozen(teacher, batch))
        weight = jnp.take_along_axis(batch["loss_weight"], places, axis=1)

        def divergence(logits_of, own, theirs):
            log_q = jax.nn.log_softmax(logits_of(own) / self.temperature)
            log_p = jax.nn.log_softmax(teacher.logits(theirs) / self.temperature)
            return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1), ()

        with jax.named_scope("loss"):
            kl, _ = by_token(divergence, forward.model, forward.params, own, theirs)
        kl = jnp.sum(jnp.where(weight > 0, kl * weight, 0.0)) / norm
        return self.temperature**2 * kl, {"kl": kl}

    def score(self, forward, heads, fixed, batch):
        return token_nll(forward.model, forward.params, forward.hidden(batch), batch, forward.targets_per_row)
