"""A ~ N(0, std^2), B = 0: the reference code of K-shot experts (arXiv 2408.15915) starts so where no LoRA is loaded."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from molora_jax.inits.base import Start


@dataclasses.dataclass(frozen=True)
class Gaussian(Start):
    std: float = 0.01

    LIMITS: ClassVar = {"std": (0, None, "()")}

    def __call__(self, key, site, rank, *, scale, base=None, base_grad=None):
        A = self.std * jax.random.normal(key, (site.experts, rank, site.d_in))
        return {"A": A, "B": jnp.zeros((site.experts, rank, site.d_out))}
