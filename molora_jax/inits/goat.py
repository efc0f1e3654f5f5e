"""GOAT (2025, arXiv 2502.16894): each expert starts at its own segment of the kernel's SVD.

    W = U S V^T (out x in), h = min(D_in, D_out), segments of h // E triplets;   s B_i A_i = U_i S_i V_i^T / rho
    A_i = sqrt(S_i / (s rho)) V_i^T,   B_i = U_i sqrt(S_i / (s rho))             i: R triplets of expert i's segment

The paper freezes W - c s sum_i B_i A_i over all E experts (not over the k that are active), c = 1 / E, the mean gate of
a router without preference: so the expected function at the start is the base's, a token's own is not. Here W stays as
it is and the start is saved as `A0 [1, E R, D_in]`, `B0 [1, E R, D_out]` (c in B0), which the adapter takes off. That
is the paper's function where a token's gates sum to 1 (softmax, renormalised); else it is taken off by their sum, and
the expectation is the base's too. The price is an inner width of R + E R an expert.
"""

import dataclasses
from typing import ClassVar, Literal

import jax.numpy as jnp

from molora_jax.errors import InputError
from molora_jax.inits._singular import singular
from molora_jax.inits.base import Start


@dataclasses.dataclass(frozen=True)
class GoatStart(Start):
    """`segments`: "goat" takes the largest R triplets of a segment, "goat_mini" the smallest. `residual`: c times E; 0
    leaves W whole, E takes off the full sum (with k of E experts active that damages the base).

    Raises:
      InputError: R above h // E, the triplets of a segment.
    """

    rho: float = 10.0
    segments: Literal["goat", "goat_mini"] = "goat"
    residual: float = 1.0

    LIMITS: ClassVar = {"rho": (0, None, "()"), "residual": (0, None)}
    NEEDS: ClassVar[tuple[str, ...]] = ("base",)
    AWAY: ClassVar[bool] = True
    RANK: ClassVar[str] = "smaller"

    def __call__(self, key, site, rank, *, scale, base=None, base_grad=None):
        E, h = site.experts, min(base.shape)
        if rank > h // E:
            raise InputError(
                f"adapter.rank at {site.name}", got=f"{rank} for each of {E} experts",
                expected=f"<= {h // E}: each starts at a segment of its own of {h} singular vectors",
                fix="Lower adapter.rank or experts.",
            )  # fmt: skip
        u, s, vt = singular(base.T, h)
        first = jnp.arange(E) * (h // E) + (h // E - rank if self.segments == "goat_mini" else 0)
        at = first[:, None] + jnp.arange(rank)
        root = jnp.sqrt(s[at] / (scale * self.rho))[..., None]
        A, B = root * vt[at], root * u.T[at]
        if not self.residual:
            return {"A": A, "B": B}
        flat = lambda x: x.reshape(1, E * rank, x.shape[-1])  # noqa: E731
        return {"A": A, "B": B, "A0": flat(A), "B0": self.residual / E * flat(B)}
