"""LoRA-GA (Wang et al. 2024, arXiv 2407.05000): the factors start at singular vectors of the loss's gradient.

    G = d L / d W = U S V^T (out x in);   A = c V_I^T,   B = c U_J,   I and J halves of the first 2R
    c = D_out^(1/4) / sqrt(gamma)         so the first step of gradient descent moves W along -svd_2R(G)

The paper freezes W - s B A. Here W stays as it is and the start is saved as `A0 [1, R, D_in]`, `B0 [1, R, D_out]` (one
copy for all experts, which start alike): the adapter adds `s (B A - B0 A0)`, the same function and the same gradients;
exported it is a plain LoRA of rank 2R. The paper's s is alpha / sqrt(R) (adapter `rslora`).
"""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from molora_jax.inits._singular import singular
from molora_jax.inits.base import Start


@dataclasses.dataclass(frozen=True)
class GaStart(Start):
    """Options are the reference's.

    `direction`: which of the first 2R go where: A the first R and B the second ("ArB2r"), the other way ("A2rBr"), B
    the even and A the odd ones ("ArBr"), or "random". `scaling` c: "stable" (as above), "unit" 1, "gd" 1 / s, "weight"
    the mean root of W's first R singular values over s. `variant` "peft" is that library's, of which B then has the
    gradient's size: A is orthonormal, B is U_J S_J with the stable factor. `norm_clip`: where max |s B A| exceeds max
    |W|, A and B are shrunk so that it does not. `batches` of the gradient, `layers` of one pass for it: each needs the
    memory of a layer's kernels in float32, and all L / layers passes are paid for. `svd`: how it is taken apart.
    """

    gamma: float = 16.0
    direction: Literal["ArB2r", "A2rBr", "ArBr", "random"] = "ArB2r"
    scaling: Literal["stable", "unit", "gd", "weight"] = "stable"
    variant: Literal["paper", "peft"] = "paper"
    norm_clip: bool = False
    batches: int = 8
    layers: int = 2
    svd: Literal["exact", "randomised"] = "exact"

    LIMITS: ClassVar = {"gamma": (0, None, "()"), "batches": (1, None), "layers": (1, None)}
    NEEDS: ClassVar[tuple[str, ...]] = ("base", "base_grad")
    AWAY: ClassVar[bool] = True
    RANK: ClassVar[str] = "half"

    def __call__(self, key, site, rank, *, scale, base=None, base_grad=None):
        u, s, vt = singular(base_grad.T, 2 * rank, self.svd, jax.random.fold_in(key, 1))
        of_a, of_b = self._halves(key, rank)
        A, B = vt[of_a], u.T[of_b]
        if self.variant == "peft":
            B = s[of_b][:, None] * B
        c = self._scaling(site, rank, scale, base)
        A, B = A if self.variant == "peft" and self.scaling == "stable" else c * A, c * B
        if self.norm_clip:
            W = base.astype(jnp.float32)
            most = jnp.max(jnp.abs(scale * A.T @ B))
            shrink = jnp.sqrt(jnp.minimum(1.0, jnp.max(jnp.abs(W)) / jnp.maximum(most, 1e-30)))
            A, B = shrink * A, shrink * B
        every = lambda x: jnp.broadcast_to(x, (site.experts, *x.shape)) + 0.0  # noqa: E731
        return {"A": every(A), "B": every(B), "A0": A[None], "B0": B[None]}

    def _scaling(self, site, rank: int, scale: float, base):
        """c, of A and B alike."""
        if self.scaling == "stable":
            return site.d_out**0.25 / self.gamma**0.5
        if self.scaling == "weight":
            values = jnp.linalg.svd(base.astype(jnp.float32), compute_uv=False)[:rank]
            return jnp.mean(jnp.sqrt(values / scale))
        return 1.0 if self.scaling == "unit" else 1.0 / scale

    def _halves(self, key, rank: int):
        """Places of A's and of B's vectors among the first 2R."""
        first, second = jnp.arange(rank), jnp.arange(rank, 2 * rank)
        if self.direction == "ArB2r":
            return first, second
        if self.direction == "A2rBr":
            return second, first
        if self.direction == "ArBr":
            return 2 * first + 1, 2 * first
        order = jax.random.permutation(key, 2 * rank)
        return order[:rank], order[rank:]
