"""LoRA-SB (Ponkshe et al. 2024, arXiv 2411.19557): the core starts as the first step of full fine-tuning.

    dW = -eta sign(d L / d W);   dW = U S V^T (out x in);   B = U_R,   A = V_R^T,   core = diag(S_R) / s

The kernel is not altered and nothing is taken off: the run begins at W + the best rank-R part of that step, not at the
base. So the first loss is not the base's. With alpha = rank (s = 1) gradient descent on the core is then full
fine-tuning projected on B and A. Weight decay on the core would pull it back to W.
"""

import dataclasses
from typing import ClassVar, Literal

import jax.numpy as jnp

from molora_jax.inits._singular import singular
from molora_jax.inits.base import Start


@dataclasses.dataclass(frozen=True)
class SbStart(Start):
    """`eta`: the step; the paper's is the first rate of the warm-up, learning_rate / warm-up steps. `batches` of the
    gradient, `layers` of one pass for it: each needs the memory of a layer's kernels in float32, and all L / layers
    passes are paid for. `step`: "sign", AdamW's first step, or "gradient" as it is (weaker); `svd`: how it is taken
    apart."""

    eta: float = 1e-4
    batches: int = 8
    layers: int = 2
    step: Literal["sign", "gradient"] = "sign"
    svd: Literal["exact", "randomised"] = "exact"

    LIMITS: ClassVar = {"eta": (0, None, "()"), "batches": (1, None), "layers": (1, None)}
    NEEDS: ClassVar[tuple[str, ...]] = ("base_grad",)
    CORE: ClassVar[bool] = True
    RANK: ClassVar[str] = "smaller"

    def __call__(self, key, site, rank, *, scale, base=None, base_grad=None):
        g = base_grad.T.astype(jnp.float32)
        change = -self.eta * (jnp.sign(g) if self.step == "sign" else g)
        u, s, vt = singular(change, rank, self.svd, key)
        core = jnp.broadcast_to(jnp.diag(s / scale), (site.experts, rank, rank))
        return {"A": vt[None], "B": u.T[None], "core": core + 0.0}
