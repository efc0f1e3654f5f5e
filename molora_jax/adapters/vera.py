"""VeRA (Kopiczko et al. 2023, arXiv 2310.11454): one frozen random pair A, B for all layers; vectors train.

    delta_e(x) = b_e * (B (d_e * (A x)))        d_e [R] starts at `d_initial`, b_e [D_out] at 0

A [R, max D_in], B [R, max D_out] float32, of the widest site of the rule; a narrower one takes the first columns. They
follow from `seed`, are saved with the run and never train. Kaiming-uniform with gain sqrt 2, as in peft: bounds
sqrt(6 / max D_in) and sqrt(6 / R). E experts share A and B; each has a d and a b of its own. There is no alpha.

R may exceed the widths: it is the number of directions that d weighs, 256 in the paper.
"""

import dataclasses
from typing import ClassVar, Literal

import jax.numpy as jnp

from molora_jax.adapters.base import Adapter
from molora_jax.core import random_bases
from molora_jax.core.types import Factors


@dataclasses.dataclass(frozen=True)
class Vera(Adapter):
    rank: int = 256
    alpha: float = 0.0
    init: Literal["kaiming"] = "kaiming"  # of the bases
    d_initial: float = 0.1
    seed: int = 0

    LIMITS: ClassVar = {"alpha": (0, 0), "seed": (0, None)}
    FROZEN: ClassVar[tuple[str, ...]] = ("basis_A", "basis_B")
    RANK_BOUND: ClassVar[bool] = False

    def scale(self):
        return 1.0

    def init_shared(self, key, sites):
        rows, widths = jnp.arange(self.rank), (max(s.d_in for s in sites), max(s.d_out for s in sites))
        A, B = (random_bases.uniform(self.seed, rows, width, stream=i) for i, width in enumerate(widths))
        return {"basis_A": (6 / widths[0]) ** 0.5 * A, "basis_B": (6 / self.rank) ** 0.5 * B}

    def init_leaves(self, key, site, layer, *, base=None, base_grad=None):
        """`d [E, R]`, `b [E, D_out]`."""
        return {
            "d": jnp.full((site.experts, self.rank), self.d_initial),
            "b": jnp.zeros((site.experts, site.d_out)),
        }

    def factors(self, p, shared, ctx):
        A, B = shared["basis_A"][:, : ctx.site.d_in], shared["basis_B"][:, : ctx.site.d_out]
        return Factors(A[None], p["d"][:, :, None] * B * p["b"][:, None, :])
