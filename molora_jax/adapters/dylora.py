"""DyLoRA (Valipour et al. 2022, arXiv 2210.07558): nested ranks; one run gives a good adapter at every rank.

    y = W x + (alpha / b) B_{1:b} A_{1:b} x,   b ~ p(b) on lowest .. R, drawn once an optimizer step
    all      the step moves A_{1:b} and B_{1:b}
    frozen   the step moves row b of A and column b of B; those before it are used, not moved (the published code's)

b follows from the run's seed and the step: it is one for all layers, sites, experts, micro-steps and devices, and a
resumed run draws it again. Its rows are masked, so one program serves all b. What a step does not train does not move,
whatever momentum and weight decay say (the published code masks the gradients alone); moments still decay there.
Evaluation and decoding use all R; the surgery `truncate` keeps the first b components with the scale alpha / b.
E experts, R rank: A [E, R, D_in], B [E, R, D_out].
"""

import dataclasses
import math
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from molora_jax.adapters.lora import Lora
from molora_jax.core.types import Array, Factors
from molora_jax.errors import InputError

TAG = 0xD1  # of the draw, among what follows from a step's key


@dataclasses.dataclass(frozen=True)
class DyLora(Lora):
    """`lowest`: the smallest rank drawn; `rank` alone trains plain LoRA. `ratio`: p(b + 1) / p(b), 1 is uniform."""

    dropout: float = 0.0
    lowest: int = 1
    ratio: float = 1.0
    update: Literal["all", "frozen"] = "all"

    LIMITS: ClassVar = {"lowest": (1, None), "ratio": (1e-3, 1.0)}
    SUBTRACTS: ClassVar[bool] = False
    LOADS: ClassVar[bool] = False  # a product read from a run has no order that a truncation would respect

    def check(self, where, sites):
        if self.lowest > self.rank:
            raise InputError(
                f"{where}.lowest", got=str(self.lowest), expected=f"at most rank = {self.rank}", fix="Lower it."
            )

    def drawn(self, step_key: Array) -> Array:
        """b of a step, int32."""
        logits = jnp.arange(self.rank - self.lowest + 1) * math.log(self.ratio)
        return self.lowest + jax.random.categorical(jax.random.fold_in(step_key, TAG), logits)

    def moved(self, b: Array) -> Array:
        """`[R]` bool: the components that a step of rank b trains."""
        component = jnp.arange(self.rank)
        return component < b if self.update == "all" else component == b - 1

    def factors(self, p, shared, ctx):
        A, B = p["A"], p["B"]
        if not ctx.train or self.lowest == self.rank:
            return Factors(A, B)
        if ctx.step_key is None:
            raise InputError(
                "adapter", got="dylora in training without a step's key, from which the rank is drawn",
                expected="the training loop (mj.train, launch.train)", fix="A module of a model has no such key.",
            )  # fmt: skip
        b = self.drawn(ctx.step_key)
        moves = self.moved(b)[:, None]
        A, B = (jnp.where(moves, F, jax.lax.stop_gradient(F)) for F in (A, B))
        used = (jnp.arange(self.rank) < b)[:, None]
        return Factors(A, jnp.where(used, B * (self.rank / b), 0.0))  # `scale` has alpha / R

    def update_mask(self, updates, step, step_key):
        moves = self.moved(self.drawn(step_key))[:, None]
        flat = flatten_dict(updates)
        own = lambda path: path[-1] in ("A", "B") and "router" not in path  # noqa: E731
        return unflatten_dict({path: jnp.where(moves, u, 0.0) if own(path) else u for path, u in flat.items()})
