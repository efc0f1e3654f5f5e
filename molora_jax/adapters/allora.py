"""ALLoRA (Huang & Balestriero 2024, arXiv 2410.09692): LoRA without scale or dropout; every row has its own rate.

    y = W x + B A x,   c_i = 1 / sqrt(||(B A)_i|| + 1 / eta^2)                        i: an output row of the change
    dB = diag(c) G A^T,   dA = B^T diag(c) G,   dx = (W + B A)^T dy                   G: the gradient of B A

c is eta at the start (B = 0) and falls as a row grows, the norm itself under the root. It belongs to the parameters'
gradients alone: the value, and what is handed to the layer below, are LoRA's, and there is no gradient through c. It
acts before the optimizer: Adam divides a constant row scale of dB out again, so there its change over time, and the
weights of rows in dA, are what remains. Every expert has rows of its own. alpha is not read.

In training the product is written as one of rank 2 R whose value is B A x and whose gradient is the above, so that
every placement, engine and kernel serves it: with [.] a constant,

    A' = ([A], A - [A]),   B' = ([B] + c (B - [B]), [c B])

E experts, R rank: A [E, R, D_in], B [E, R, D_out], c [E, D_out].
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from molora_jax.adapters.lora import Lora
from molora_jax.core.types import Array, Factors


@dataclasses.dataclass(frozen=True)
class Allora(Lora):
    """`eta_squared`: in place of alpha and dropout; the paper tries 1, 2 and 4. A dropout above 0 is its ALLoRA+D."""

    dropout: float = 0.0
    eta_squared: float = 2.0

    LIMITS: ClassVar = {"eta_squared": (0, 1e6, "()")}
    SUBTRACTS: ClassVar[bool] = False
    LOADS: ClassVar[bool] = True

    def scale(self):
        return 1.0

    def factors(self, p, shared, ctx):
        A, B = p["A"], p["B"]
        if not ctx.train:
            return Factors(A, B)
        A0, B0 = jax.lax.stop_gradient((A, B))
        c = rates(A0, B0, self.eta_squared)[:, None, :]
        return Factors(jnp.concatenate([A0, A - A0], axis=1), jnp.concatenate([B0 + c * (B - B0), c * B0], axis=1))


def row_norms(A: Array, B: Array) -> Array:
    """`||(B_e A_e)_i||` of every output row, `[E, D_out]`, without forming `B A`."""
    square = jnp.sum(B * ((A @ jnp.swapaxes(A, -1, -2)) @ B), axis=-2)
    return jnp.sqrt(jnp.maximum(square, 0.0))  # a sum that cancels may round below 0


def rates(A: Array, B: Array, eta_squared: float) -> Array:
    """c, `[E, D_out]`."""
    return jax.lax.rsqrt(row_norms(A, B) + 1 / eta_squared)
