"""LoRA-FA (Zhang et al. 2023, arXiv 2308.03303): LoRA with A frozen at its random start; B alone trains.

    delta_e(x) = s B_e A_e x,   A_e ~ U(+-1/sqrt(D_in)) drawn once, saved and never moved

So the input of width D_in need not be kept for a gradient, only A x of width R. A is of float32, an A for each expert.

`precondition` replaces the gradient of B by that of the best change of the whole weight which this A allows, as peft's
LoRA-FA optimizer does:  G_B <- (1 / s^2) (A A^T + 1e-8 I)^-1 G_B.  It is done where the gradient is formed, so clipping
and the reported norm see the result (peft clips before; `train.clip=0.0` makes them equal). peft's Adam has eps 1e-6.
"""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp

from molora_jax.adapters.lora import Lora
from molora_jax.core.types import Array

RIDGE = 1e-8


@dataclasses.dataclass(frozen=True)
class LoraFA(Lora):
    precondition: bool = False

    REFUSES: ClassVar[tuple] = (
        (
            "adapter.precondition", (("adapter.precondition", "is", True), ("placement.factors", "is", "shared_outer")),
            "False: a B that all experts share belongs to no one A", "Or use factors='own'.",
        ),
    )  # fmt: skip
    FROZEN: ClassVar[tuple[str, ...]] = ("A", "A0", "B0")
    SUBTRACTS: ClassVar[bool] = True  # through Lora's

    def factors(self, p, shared, ctx):
        if self.precondition:
            p = p | {"B": preconditioned(p["B"], p["A"], self.scale())}
        return super().factors(p, shared, ctx)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def preconditioned(B: Array, A: Array, scale: float) -> Array:
    """`B [E, R, D_out]` itself, whose cotangent G becomes `(1 / s^2) (A A^T + 1e-8 I)^-1 G`; `A [E, R, D_in]`."""
    return B


def _backward(scale, A, g):
    gram = jnp.einsum("erd,eqd->erq", A, A) + RIDGE * jnp.eye(A.shape[1], dtype=A.dtype)
    return _solved(gram, g) / scale**2, jnp.zeros_like(A)


def _solved(G: Array, y: Array) -> Array:
    """`G^-1 y` of symmetric positive `G [E, R, R]`, `y [E, R, D]`, by elimination.

    Arithmetic alone: a call of LAPACK, as `jnp.linalg.solve` is on a CPU, is not split by a mesh.
    """

    def eliminate(i, rows):
        row = rows[:, i] / rows[:, i, i, None]
        return (rows - rows[:, :, i, None] * row[:, None]).at[:, i].set(row)

    both = jnp.concatenate([jnp.broadcast_to(G, (len(y), *G.shape[1:])), y], axis=-1)
    return jax.lax.fori_loop(0, y.shape[1], eliminate, both)[..., y.shape[1] :]


preconditioned.defvjp(lambda B, A, scale: (B, A), _backward)
