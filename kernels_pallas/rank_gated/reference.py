"""`y_t = sum_e g_te B_e A_e x_t`, written as it reads."""

import jax.numpy as jnp


def rank_gated(x, A, B, gates):
    """`x [T, D_in]`, `A [1|E, R, D_in]`, `B [E, R, D_out]`, `gates [T, E]` -> `[T, D_out]` in x's dtype."""
    z = jnp.einsum("td,erd->ter", x, A)
    return jnp.einsum("te,ter,ero->to", gates, jnp.broadcast_to(z, (*gates.shape, A.shape[1])), B).astype(x.dtype)
