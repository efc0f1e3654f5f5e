"""Eigenvectors of many small symmetric matrices, by arithmetic alone (Jacobi's rotations, Brent and Luk 1985).

LAPACK under XLA is a call that no mesh splits, and several of them in one CPU program can wait for each other for ever
(jaxlib 0.10.2 with two threads: 28 independent `jnp.linalg.eigh` of [16, 16, 16]). Here a round turns n / 2 disjoint
pairs (p, q) of rows and columns so that entry (p, q) is 0; n - 1 rounds, a sweep, meet every pair. All of it is
elementwise over the leading axes: sharded leaves stay where they are.
"""

import jax
import jax.numpy as jnp
import numpy as np

from molora_jax.core.types import Array

SWEEPS = 8  # convergence is quadratic: float32 is reached in 5 to 7, for 2 to 64 rows


def symmetric(G: Array) -> tuple[Array, Array]:
    """`G [..., n, n]` float32 -> eigenvalues `[..., n]` in no order, vectors `[..., n, n]`: `G = V diag(w) V^T`."""
    n = G.shape[-1]
    size = max(n + n % 2, 2)  # a row of zeros stays by itself
    G = jnp.pad(G, [(0, 0)] * (G.ndim - 2) + [(0, size - n)] * 2)
    half, order = size // 2, _next_round(size)

    def turn(x, c, s):
        """Rows p and q = p + n/2 of `x [..., n, m]`, then all rows in the order of the next round."""
        p, q = x[..., :half, :], x[..., half:, :]
        return jnp.concatenate([c * p - s * q, s * p + c * q], axis=-2)[..., order, :]

    def a_round(carry, _):
        G, Vt = carry
        diagonal = jnp.diagonal(G, axis1=-2, axis2=-1)
        off = jnp.diagonal(G[..., :half, half:], axis1=-2, axis2=-1)
        tau = (diagonal[..., half:] - diagonal[..., :half]) / jnp.where(off == 0, 1.0, 2 * off)
        t = jnp.where(tau < 0, -1.0, 1.0) / (jnp.abs(tau) + jnp.sqrt(1 + tau * tau))
        t = jnp.where(off == 0, 0.0, t)[..., None]
        c = 1 / jnp.sqrt(1 + t * t)
        G = turn(jnp.swapaxes(turn(G, c, t * c), -1, -2), c, t * c)
        return (G, turn(Vt, c, t * c)), None

    start = G.astype(jnp.float32), jnp.broadcast_to(jnp.eye(size, dtype=jnp.float32), G.shape)
    (G, Vt), _ = jax.lax.scan(a_round, start, None, length=SWEEPS * (size - 1))
    return jnp.diagonal(G, axis1=-2, axis2=-1)[..., :n], jnp.swapaxes(Vt, -1, -2)[..., :n, :n]


def _next_round(n: int) -> np.ndarray:
    """Who stands where in the next round of a tournament of n: the first stays, the others go round."""
    half = n // 2
    if half == 1:
        return np.array([0, 1])
    return np.array([0, half, *range(1, half - 1), *range(half + 1, n), half - 1])
