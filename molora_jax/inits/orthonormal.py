"""Random orthonormal outer factors and a core of zeros: what LoRA-XS and LoRA-SB are compared with."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from molora_jax.inits.base import Start


@dataclasses.dataclass(frozen=True)
class Orthonormal(Start):
    CORE: ClassVar[bool] = True
    RANK: ClassVar[str] = "smaller"

    def __call__(self, key, site, rank, *, scale, base=None, base_grad=None):
        def rows(tag, width):
            normal = jax.random.normal(jax.random.fold_in(key, tag), (width, rank))
            return jnp.linalg.qr(normal)[0].T[None]

        return {
            "A": rows(0, site.d_in), "B": rows(1, site.d_out),
            "core": jnp.zeros((site.experts, rank, rank)),
        }  # fmt: skip
