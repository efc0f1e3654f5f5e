"""LoRA (Hu et al. 2021, arXiv 2106.09685):  delta_e(x) = (alpha / R) B_e A_e x.

E experts, R rank:  A [E, R, D_in],  B [E, R, D_out]  (rank-major: the wide axis is the lane axis).

An init that starts away from zero (PiSSA) saves its start `A0, B0`, and the change is `s (B A - B0 A0)`: the frozen
base weight is never altered, so experts, merging and export all stay differences to one base.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from molora_jax.adapters.base import Adapter
from molora_jax.core.types import Factors


@dataclasses.dataclass(frozen=True)
class Lora(Adapter):
    SUBTRACTS: ClassVar[bool] = True
    LOADS: ClassVar[bool] = True  # holds any product B A as it is, so experts can be read from runs

    def factors(self, p, shared, ctx):
        A, B = p["A"], p["B"]
        if "A0" in p:
            every = lambda x: jnp.broadcast_to(x, (len(B), *x.shape[1:]))  # noqa: E731  (its rank may be another)
            A = jnp.concatenate([every(A), every(p["A0"])], axis=1)
            B = jnp.concatenate([B, every(-p["B0"])], axis=1)
        return Factors(A, B)
