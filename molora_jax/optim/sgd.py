"""Plain SGD, `x <- x - lr (g + weight_decay x)`: no moments, so that a change of scale is a change of rate."""

import dataclasses
from typing import ClassVar

import optax

from molora_jax.optim.base import Optimizer


@dataclasses.dataclass(frozen=True)
class Sgd(Optimizer):
    """`momentum` 0: none. Adam's `b1`, `b2`, `eps` are not read."""

    momentum: float = 0.0

    LIMITS: ClassVar = {"momentum": (0, 1, "[)")}

    def make(self, total_steps, pairs):
        decay = optax.add_decayed_weights(self.weight_decay) if self.weight_decay else optax.identity()
        trace = optax.trace(self.momentum) if self.momentum else optax.identity()
        return optax.chain(decay, trace, optax.scale_by_learning_rate(self.schedule(total_steps)))
