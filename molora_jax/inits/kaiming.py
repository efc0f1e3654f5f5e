"""LoRA's own start: A ~ U(+-1/sqrt(D_in)) (Kaiming-uniform with a = sqrt 5), B = 0, so nothing changes at step 0."""

import jax
import jax.numpy as jnp


def init(key, site, rank, *, scale, base=None, base_grad=None):
    """Returns `A [E, R, D_in]`, `B [E, R, D_out]`, float32."""
    bound = site.d_in**-0.5
    return {
        "A": jax.random.uniform(key, (site.experts, rank, site.d_in), minval=-bound, maxval=bound),
        "B": jnp.zeros((site.experts, rank, site.d_out)),
    }
