"""Singular vectors of a kernel or of its gradient, for the starts that are made of them."""

import jax
import jax.numpy as jnp

from molora_jax.core.types import Array

POWER = 4  # iterations: each sharpens the spectrum by its square


def singular(matrix: Array, count: int, how: str = "exact", key: Array | None = None) -> tuple[Array, Array, Array]:
    """`(U [M, count], S [count], V^T [count, N])` of `matrix [M, N]`, largest first, in float32.

    Args:
      how: "exact", or "randomised" (Halko et al. 2011): of the matrix seen from 2 `count` random directions, after
        `POWER` iterations. That one needs `key`.
    """
    matrix = matrix.astype(jnp.float32)
    if how == "exact":
        u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
        return u[:, :count], s[:count], vt[:count]
    orthonormal = lambda x: jnp.linalg.qr(x)[0]  # noqa: E731
    q = orthonormal(matrix @ jax.random.normal(key, (matrix.shape[1], min(2 * count, *matrix.shape))))
    for _ in range(POWER):
        q = orthonormal(matrix @ orthonormal(matrix.T @ q))
    u, s, vt = jnp.linalg.svd(q.T @ matrix, full_matrices=False)
    return q @ u[:, :count], s[:count], vt[:count]
