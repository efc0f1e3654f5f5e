"""The optimizer contract: a frozen dataclass of `config.optim`; `make(total_steps, pairs)` gives an optax transform.

`pairs = {(path of A, path of B): s}` names the low-rank factors that belong together, for optimizers that need both.
Clipping is done by the step, which needs the norm anyway.

The learning rate is an argument of the compiled step: inside it `make` and `schedule` are called on `at(rates)`, whose
`learning_rate` is a traced scalar. A member reads the field as ever, but may not branch on its value.
"""

import dataclasses
from typing import ClassVar, Literal

import jax.numpy as jnp
import optax


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """`decay`: constant, linear or cosine (to 0 at `total_steps`), after `warmup` steps. `b1, b2, eps`: Adam's.

    `restart`: every stage of the run has a warm-up and a decay of its own; else they are those of the whole run.
    """

    learning_rate: float = 2e-4
    weight_decay: float = 0.0
    decay: Literal["linear", "cosine", "constant"] = "cosine"
    warmup: int = 0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    restart: bool = dataclasses.field(default=False, kw_only=True)

    LIMITS: ClassVar = {
        "learning_rate": (0, 1e3, "(]"), "weight_decay": (0.0, 1e3), "warmup": (0, None), "b1": (0, 1, "[)"),
        "b2": (0, 1, "[)"), "eps": (0, None, "()"),
    }  # fmt: skip

    _rise: ClassVar[float | None] = None  # of `at`: from the full rate to that of the first step of the warm-up
    _start: ClassVar[float] = 0  # of `begun`, `at`: the step at which the schedule begins

    def rates(self) -> dict[str, float]:
        """What of the schedule is an argument of the step; `rise` is formed here, in double precision."""
        lr = self.learning_rate
        rates = {"learning_rate": lr, "rise": lr / self.warmup - lr if self.warmup else 0.0}
        return rates | ({"start": float(self._start)} if self.restart else {})

    def begun(self, start: int) -> "Optimizer":
        """Itself in a stage that begins after `start` steps; no other than itself without `restart`."""
        out = dataclasses.replace(self)
        object.__setattr__(out, "_start", start)
        return out

    def at(self, rates: dict) -> "Optimizer":
        """Itself with the rates of an argument, as from `rates()`."""
        out = dataclasses.replace(self, learning_rate=rates["learning_rate"])
        object.__setattr__(out, "_rise", rates["rise"])
        object.__setattr__(out, "_start", rates.get("start", 0))
        return out

    def schedule(self, total_steps: int) -> optax.Schedule:
        """Learning rate of the update that makes step `i + 1` (i from 0). `total_steps`: of a stage with `restart`."""
        rate = self._from_zero(total_steps)
        return (lambda i: rate(i - self._start)) if self.restart else rate

    def _from_zero(self, total_steps: int) -> optax.Schedule:
        rest = max(total_steps - self.warmup, 1)
        after = {
            "constant": optax.constant_schedule(self.learning_rate),
            "linear": optax.linear_schedule(self.learning_rate, 0.0, rest),
            "cosine": optax.cosine_decay_schedule(self.learning_rate, rest),
        }[self.decay]
        if not self.warmup:
            return after
        # step 1 already moves: the ramp ends at the full rate on step `warmup`
        rise, length = self.rates()["rise"] if self._rise is None else self._rise, max(self.warmup - 1, 1)
        ramp = lambda i: rise * (1 - jnp.clip(i, 0, length) / length) + self.learning_rate  # noqa: E731
        return optax.join_schedules([ramp, after], [self.warmup])

    def make(self, total_steps: int, pairs: dict[tuple[str, str], float]) -> optax.GradientTransformation:
        raise NotImplementedError
