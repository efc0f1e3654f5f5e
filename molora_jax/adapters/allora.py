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

Its ablations, `form`:

    outputs   ALLoRA-OD: c_i = 1 / sqrt(|(B A x)_i| + 1 / eta^2) of every token, in the place of the rows'
    forward   ASF-LoRA: y_i += (B A x)_i / sqrt(|(B A x)_i| + 1 / eta^2), with its own gradient; it cannot be merged

T tokens, E experts, R rank: A [E, R, D_in], B [E, R, D_out], c [E, D_out].
"""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from molora_jax.adapters.lora import Lora
from molora_jax.core.types import Array, Factors


@dataclasses.dataclass(frozen=True)
class Allora(Lora):
    """`eta_squared`: in place of alpha and dropout; the paper tries 1, 2 and 4. A dropout above 0 is its ALLoRA+D."""

    dropout: float = 0.0
    eta_squared: float = 2.0
    form: Literal["rows", "outputs", "forward"] = "rows"

    LIMITS: ClassVar = {"eta_squared": (0, 1e6, "()")}
    SUBTRACTS: ClassVar[bool] = False
    LOADS: ClassVar[bool] = False  # what is read from a run does not train, and this is about how it would

    def scale(self):
        return 1.0

    def factors(self, p, shared, ctx):
        A, B = p["A"], p["B"]
        if self.form == "forward":
            return Factors(A, B, form=self.adapted)
        if not ctx.train:
            return Factors(A, B)
        if self.form == "outputs":
            return Factors(A, B, form=self.watched)
        A0, B0 = jax.lax.stop_gradient((A, B))
        c = rates(A0, B0, self.eta_squared)[:, None, :]
        return Factors(jnp.concatenate([A0, A - A0], axis=1), jnp.concatenate([B0 + c * (B - B0), c * B0], axis=1))

    def adapted(self, x, A, B):
        """ASF-LoRA."""
        y = _products(x, A, B)
        return y * jax.lax.rsqrt(jnp.abs(y) + 1 / self.eta_squared)

    def watched(self, x, A, B):
        """ALLoRA-OD: the value is B A x, whose gradient goes to x as it is and to A and B times c."""
        stop = jax.lax.stop_gradient
        y, own = _products(x, stop(A), stop(B)), _products(stop(x), A, B)
        return y + stop(jax.lax.rsqrt(jnp.abs(y) + 1 / self.eta_squared)) * (own - stop(own))


def _products(x: Array, A: Array, B: Array) -> Array:
    """`x [T, D_in]` -> `B_e A_e x`, `[T, E, D_out]`."""
    z = jnp.einsum("td,erd->ter", x, A)
    return jnp.einsum("ter,ero->teo", jnp.broadcast_to(z, (len(z), *B.shape[:2])), B)


def row_norms(A: Array, B: Array) -> Array:
    """`||(B_e A_e)_i||` of every output row, `[E, D_out]`, without forming `B A`."""
    square = jnp.sum(B * ((A @ jnp.swapaxes(A, -1, -2)) @ B), axis=-2)
    return jnp.sqrt(jnp.maximum(square, 0.0))  # a sum that cancels may round below 0


def rates(A: Array, B: Array, eta_squared: float) -> Array:
    """c, `[E, D_out]`."""
    return jax.lax.rsqrt(row_norms(A, B) + 1 / eta_squared)
