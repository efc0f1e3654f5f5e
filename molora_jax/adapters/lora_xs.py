"""LoRA-XS (Balazy et al. 2024, arXiv 2405.17604):  delta_e(x) = s B C_e A x, of which the core C_e alone trains.

A [1, R, D_in] and B [1, R, D_out] are frozen, float32, the same for all experts of a layer; core C [E, R, R]. So a
matrix has E R^2 trained parameters, whatever its widths. Where they start is `init`, one that says CORE: `lora_xs`
(singular vectors of the kernel), `lora_sb` (of the first step of full fine-tuning), `orthonormal` (random).
With s = 1 (alpha = rank) and orthonormal A and B, gradient descent on the core is that of W inside their span.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from molora_jax.adapters.base import Adapter
from molora_jax.core.types import Factors


@dataclasses.dataclass(frozen=True)
class LoraXs(Adapter):
    init: str = "lora_xs"

    FROZEN: ClassVar[tuple[str, ...]] = ("A", "B")
    CORE: ClassVar[bool] = True

    def factors(self, p, shared, ctx):
        B = jnp.broadcast_to(p["B"], (len(p["core"]), *p["B"].shape[1:]))
        return Factors(p["A"], B, mid=p["core"])
