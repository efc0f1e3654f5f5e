"""`y_t = sum_k g_tk B[e_tk] A[e_tk] x_t`, written as it reads; what stands at an unused slot is not read."""

import jax
import jax.numpy as jnp


def grouped_lora(x, A, B, idx, gates):
    """`x [T, D_in]`, `A [1|E, R, D_in]`, `B [E, R, D_out]`, `idx, gates [T, K]` -> `[T, D_out]` in x's dtype."""
    used = idx < B.shape[0]
    rows = jnp.where(jnp.any(used, axis=1, keepdims=True), x, 0)
    return expand(shrink(rows, A, idx, B.shape[0]), B, idx, jnp.where(used, gates, 0)).astype(x.dtype)


def _hot(idx, E):
    return jax.nn.one_hot(idx, E, dtype=jnp.float32)  # a padded slot is all zero


def shrink(x, A, idx, E):
    A = jnp.broadcast_to(A, (E, *A.shape[1:]))
    return jnp.einsum("tke,td,erd->tkr", _hot(idx, E), x, A)


def expand(z, B, idx, gates):
    return jnp.einsum("tk,tke,tkr,ero->to", gates, _hot(idx, B.shape[0]), z, B)
