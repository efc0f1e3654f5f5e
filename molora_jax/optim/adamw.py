"""AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101); weight decay 0 is the habit for adapters."""

import dataclasses

import optax

from molora_jax.optim.base import Optimizer


@dataclasses.dataclass(frozen=True)
class AdamW(Optimizer):
    def make(self, total_steps, pairs):
        return optax.adamw(
            self.schedule(total_steps), b1=self.b1, b2=self.b2, eps=self.eps, weight_decay=self.weight_decay
        )
