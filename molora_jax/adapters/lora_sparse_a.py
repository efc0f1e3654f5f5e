"""LoRA with a frozen sparse random A (FlyLoRA, arXiv 2510.08396):  delta_e(x) = (alpha / R) B_e A_e x, B alone trains.

A of all experts together is one matrix of r = E R rows, each with round(density D_in) entries of N(0, 1 / r^2), made
from `seed`, site and layer and saved. With experts of rank 1 the router `sparse_projection` of the same seed and
density has the same matrix: then A is the router, and alpha here is the paper's divided by r.
"""

import dataclasses
from typing import ClassVar

import jax

from molora_jax.adapters.lora import Lora
from molora_jax.core import sparse_projection


@dataclasses.dataclass(frozen=True)
class LoraSparseA(Lora):
    """`input_grad=False`: the change sends no gradient to x, as in the reference's package; layers below then learn
    through the frozen projection alone.
    """

    density: float = 0.25
    seed: int = 0
    input_grad: bool = True

    LIMITS: ClassVar = {"density": (0, 1, "(]"), "seed": (0, None)}
    FROZEN: ClassVar[tuple[str, ...]] = ("A", "A0", "B0")
    LOADS: ClassVar[bool] = False  # its A is its own

    def init_leaves(self, key, site, layer, *, base=None, base_grad=None):
        leaves = super().init_leaves(key, site, layer, base=base, base_grad=base_grad)
        A = sparse_projection.rows(self.seed, site, layer, site.experts * self.rank, self.density)
        return leaves | {"A": A.reshape(site.experts, self.rank, site.d_in)}

    def latent(self, z, p, ctx):
        return z if self.input_grad else jax.lax.stop_gradient(z)
