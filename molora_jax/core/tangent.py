"""What a step of two factors can do to the weight: the tangent space of B A, and the step in it nearest to a gradient.

    W = W0 + s B A,   g = dL/dW,   a = s B^T g,   b = s g A^T                     a, b: the gradients of A and B
    moved(a, b) = s (B a + b A)                           how a step along (a, b) moves W, to first order
    g~ = P_B g + g P_A - P_B g P_A                        the projection of g on {B M + N A}: nothing there is nearer
    a' = (1/s^2) (B^T B)^-1 a + X A,   b' = (1/s^2) (I - P_B) b (A A^T)^-1 - B X,   moved(a', b') = g~ for every X
    (B^T B) X + X (A A^T) = -(1/s^2) (B^T B)^-1 a A^T     the X whose (a', b') are nearest to (a, b)

LoRA-Pro, arXiv 2407.18242, theorems 2.1 to 2.3. Factors are rank-major: `A [..., R, D_in]`, `B [..., R, D_out]` is the
paper's B transposed, a weight is a kernel, `[..., D_in, D_out]`. Every pair of the leading axes is by itself. All of it
is float32 whatever the backend's habit: squares of rank-wide factors are inverted.
"""

import functools

import jax.numpy as jnp

from molora_jax.core import eigen
from molora_jax.core.types import Array

einsum = functools.partial(jnp.einsum, precision="highest", preferred_element_type=jnp.float32)


def spectra(A: Array, B: Array) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """Eigenvalues `[..., R]`, not below 0, and vectors `[..., R, R]` of `A A^T`, and those of `B^T B`."""
    values, vectors = eigen.symmetric(jnp.stack([einsum("...rd,...qd->...rq", F, F) for F in (A, B)]))
    values = jnp.maximum(values, 0.0)
    return (values[0], vectors[0]), (values[1], vectors[1])


def inverse(values: Array, vectors: Array, ridge: float) -> Array:
    """`(G + ridge max(values) I)^-1` of a spectrum, `[..., R, R]`; 0 where all of G is (a factor at zero)."""
    top = jnp.max(values, axis=-1, keepdims=True)
    kept = jnp.where(top > 0, 1.0 / jnp.where(top > 0, values + ridge * top, 1.0), 0.0)
    return einsum("...rk,...k,...qk->...rq", vectors, kept, vectors)


def moved(A: Array, B: Array, a: Array, b: Array, s: float) -> Array:
    """`[..., D_in, D_out]`: how a step along `(a, b)`, shaped as `(A, B)`, moves the kernel, to first order."""
    return s * (einsum("...rd,...ro->...do", a, B) + einsum("...rd,...ro->...do", A, b))


def gradients(A: Array, B: Array, g: Array, s: float) -> tuple[Array, Array]:
    """`(a, b)` of a kernel's gradient `g [..., D_in, D_out]`."""
    return s * einsum("...ro,...do->...rd", B, g), s * einsum("...rd,...do->...ro", A, g)


def nearest(A: Array, B: Array, a: Array, b: Array, s: float, ridge: float, X: Array | None = None, *, of=None):
    """`(a', b')`: of all steps whose `moved` is g~ the one nearest to `(a, b)`, the gradients of A and B.

    Args:
      ridge: of both inverses, as a part of the largest eigenvalue.
      X: `[..., R, R]`, for another one of them. of: `spectra(A, B)`, where they are known.
    """
    (alpha, V), (beta, U) = spectra(A, B) if of is None else of
    of_A, of_B = inverse(alpha, V, ridge), inverse(beta, U, ridge)
    a_first = einsum("...rq,...qd->...rd", of_B, a) / s**2
    if X is None:
        right = einsum("...ri,...rd,...qd,...qj->...ij", U, a_first, A, V)
        below = beta[..., :, None] + alpha[..., None, :]
        X = -einsum("...ri,...ij,...qj->...rq", U, jnp.where(below > 0, right / jnp.where(below > 0, below, 1), 0), V)
    inside = einsum("...ro,...qo,...qp,...pk->...rk", b, B, of_B, B)  # b^T P_B
    b_first = einsum("...rq,...qo->...ro", of_A, b - inside) / s**2
    return a_first + einsum("...rq,...qd->...rd", X, A), b_first - einsum("...qr,...qo->...ro", X, B)
