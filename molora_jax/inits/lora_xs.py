"""LoRA-XS (Balazy et al. 2024, arXiv 2405.17604): frozen outer factors of the kernel's SVD, and a core near zero.

    W = U S V^T (out x in);   A = S_R V_R^T,   B = U_R,   core ~ N(0, deviation^2)

One A and B for all experts, each expert its own core. The kernel is not altered: s B core A is added to it.
"""

import dataclasses
from typing import ClassVar, Literal

import jax

from molora_jax.inits._singular import singular
from molora_jax.inits.base import Start


@dataclasses.dataclass(frozen=True)
class XsStart(Start):
    """`deviation` of the core's entries; `svd`: how the singular vectors are found."""

    deviation: float = 1e-5
    svd: Literal["exact", "randomised"] = "exact"

    LIMITS: ClassVar = {"deviation": (0, None)}
    NEEDS: ClassVar[tuple[str, ...]] = ("base",)
    CORE: ClassVar[bool] = True
    RANK: ClassVar[str] = "smaller"

    def __call__(self, key, site, rank, *, scale, base=None, base_grad=None):
        u, s, vt = singular(base.T, rank, self.svd, jax.random.fold_in(key, 1))
        core = self.deviation * jax.random.normal(key, (site.experts, rank, rank))
        return {"A": (s[:, None] * vt)[None], "B": u.T[None], "core": core}
