"""`y_t = sum_k g_tk B[e_tk] A[e_tk] x_t`, written as it reads."""

import jax
import jax.numpy as jnp


def grouped_lora(x, A, B, idx, gates):
    """`x [T, D_in]`, `A [1|E, R, D_in]`, `B [E, R, D_out]`, `idx, gates [T, K]` -> `[T, D_out]`."""
    return expand(shrink(x, A, idx, B.shape[0]), B, idx, gates)


def _hot(idx, E):
    return jax.nn.one_hot(idx, E, dtype=jnp.float32)  # a padded slot is all zero


def shrink(x, A, idx, E):
    A = jnp.broadcast_to(A, (E, *A.shape[1:]))
    return jnp.einsum("tke,td,erd->tkr", _hot(idx, E), x, A)


def expand(z, B, idx, gates):
    return jnp.einsum("tk,tke,tkr,ero->to", gates, _hot(idx, B.shape[0]), z, B)
