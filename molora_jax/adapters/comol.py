"""CoMoL (2026, arXiv 2603.00573): one A and B, the experts are R x R cores between them, mixed per token.

    z = A x,   y = W x + s B (z^T M(x))^T,   M(x) = sum_e g_e M_e                s = alpha / R

A [1, R, D_in], B [1, R, D_out], core M [E, R, R] in the row-vector convention (z^T M). It is E LoRAs with tied A and B
whose e-th change is s B M_e^T A: E R^2 parameters more than LoRA. The merged core of a token is never formed: the gates
weigh the E products z^T M_e. So the code's dropout on the entries of that core, and on z^T M, is not there.

Gates near 1 / E and random cores give z a gain of about 1 / sqrt(3 E) beside LoRA: compare with a grid of rates.
"""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from molora_jax.adapters.base import Adapter
from molora_jax.core.types import Factors


@dataclasses.dataclass(frozen=True)
class Comol(Adapter):
    """`cores`: "kaiming" U(+-1 / sqrt(R)) as in the code, or "identity", I and N(0, `noise`^2): near plain LoRA."""

    cores: Literal["kaiming", "identity"] = "kaiming"
    noise: float = 0.02

    LIMITS: ClassVar = {"noise": (0, None)}

    def init_leaves(self, key, site, layer, *, base=None, base_grad=None):
        one = dataclasses.replace(site, experts=1)
        leaves = super().init_leaves(key, one, layer, base=base, base_grad=base_grad)
        key, shape = jax.random.fold_in(key, 1), (site.experts, self.rank, self.rank)
        if self.cores == "identity":
            return leaves | {"core": jnp.eye(self.rank) + self.noise * jax.random.normal(key, shape)}
        bound = self.rank**-0.5
        return leaves | {"core": jax.random.uniform(key, shape, minval=-bound, maxval=bound)}

    def factors(self, p, shared, ctx):
        B = jnp.broadcast_to(p["B"], (len(p["core"]), *p["B"].shape[1:]))
        return Factors(p["A"], B, mid=jnp.swapaxes(p["core"], 1, 2))
