"""A member of every other axis, as small as each can be."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import optax

from molora_jax.adapters.lora import Lora
from molora_jax.inits.base import Start
from molora_jax.losses.base import Loss, leaves
from molora_jax.objectives.lm import LM
from molora_jax.optim.base import Optimizer
from molora_jax.placements.projection import Projection


@dataclasses.dataclass(frozen=True)
class Louder(Lora):
    gain: float = 2.0

    LIMITS: ClassVar = {"gain": (0, None, "()")}

    def scale(self):
        return self.gain * self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class Forgetful(Lora):
    """Writes `factors` anew, without a start A0, B0."""

    def factors(self, p, shared, ctx):
        return super().factors({"A": p["A"], "B": p["B"]}, shared, ctx)


@dataclasses.dataclass(frozen=True)
class Values(Projection):
    NAME: ClassVar[str] = "values"
    NAMED: ClassVar[bool] = True
    SITES: ClassVar[tuple[str, ...]] = ("q", "v")


@dataclasses.dataclass(frozen=True)
class Peak(Loss):
    """The mean of each token's largest probability."""

    form: Literal["plain", "square"] = "plain"

    def stats(self, routing, ctx):
        peak = jnp.max(routing.probs, axis=-1) ** (2 if self.form == "square" else 1)
        return {
            "peak": jnp.sum(jnp.where(routing.valid, peak, 0.0)),
            "tokens": jnp.sum(routing.valid, dtype=jnp.float32),
        }

    def value(self, stats):
        return jnp.mean(jnp.concatenate([s["peak"] / jnp.maximum(s["tokens"], 1.0) for *_, s in leaves(stats)]))


@dataclasses.dataclass(frozen=True)
class Lion(Optimizer):
    def make(self, total_steps, pairs):
        return optax.lion(self.schedule(total_steps), b1=self.b1, b2=self.b2, weight_decay=self.weight_decay)


@dataclasses.dataclass(frozen=True)
class Scaled(LM):
    """The LM's loss times a factor."""

    by: float = 0.5

    LIMITS: ClassVar = {"by": (0.0, 1.0)}

    def loss(self, forward, heads, fixed, batch, norm):
        loss, metrics = super().loss(forward, heads, fixed, batch, norm)
        return self.by * loss, metrics


def narrow(key, site, rank, *, scale, base=None, base_grad=None):
    """A tenth of LoRA's own start."""
    A = 0.1 * site.d_in**-0.5 * jax.random.normal(key, (site.experts, rank, site.d_in))
    return {"A": A, "B": jnp.zeros((site.experts, rank, site.d_out))}


@dataclasses.dataclass(frozen=True)
class Narrow(Start):
    """The same by an option: `init=dict(name="mypackage.more:Narrow", by=0.1)`."""

    by: float = 0.1

    LIMITS: ClassVar = {"by": (0, 1)}

    def __call__(self, key, site, rank, *, scale, base=None, base_grad=None):
        found = narrow(key, site, rank, scale=scale)
        return found | {"A": 10 * self.by * found["A"]}


def away(key, site, rank, *, scale, base=None, base_grad=None):
    """Starts away from zero, and does not say so at its module's top level."""
    found = narrow(key, site, rank, scale=scale)
    B = found["B"] + 1.0
    return {"A": found["A"], "B": B, "A0": found["A"][:1], "B0": B[:1]}


away.AWAY = True
