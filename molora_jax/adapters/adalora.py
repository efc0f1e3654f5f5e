"""AdaLoRA (Zhang et al. 2023, arXiv 2303.10512): a change in the form of a singular value decomposition.

    y = W x + alpha / (R + 1e-5) B diag(lam) A x                  a triplet: (lam_i, row i of A, column i of B)

The optimizer `adalora` sets lam of the least important triplets to 0 until a budget is met, over all layers, sites and
experts together; the loss `orthogonal` keeps A and B near orthonormal. R is the initial rank and stays in the scale.
lam starts at 0 and A, B at N(0, 0.02^2), as peft has them: the start changes nothing.
E experts, R rank: A [E, R, D_in], B [E, R, D_out], lam [E, R].
"""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from molora_jax.adapters.base import Adapter
from molora_jax.core.types import Factors

DEVIATION = 0.02


@dataclasses.dataclass(frozen=True)
class AdaLora(Adapter):
    rank: int = 12
    init: Literal["kaiming"] = "kaiming"  # not read: the start is lam = 0, whatever A and B

    PAIRED: ClassVar[bool] = False

    def scale(self):
        return self.alpha / (self.rank + 1e-5)

    def init_leaves(self, key, site, layer, *, base=None, base_grad=None):
        normal = lambda tag, d: jax.random.normal(jax.random.fold_in(key, tag), (site.experts, self.rank, d))  # noqa: E731
        return {
            "A": DEVIATION * normal(0, site.d_in), "B": DEVIATION * normal(1, site.d_out),
            "lam": jnp.zeros((site.experts, self.rank)),
        }  # fmt: skip

    def factors(self, p, shared, ctx):
        return Factors(p["A"], p["B"] * p["lam"][..., None])
