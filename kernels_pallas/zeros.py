"""What a weight or mask of 0 does in every form of every op: it selects nothing, whatever stands there."""

import jax.numpy as jnp


def gated(w, x):
    """`w x`, 0 where w is 0, even where x is not finite (`where`, never a product by zero)."""
    return jnp.where(w == 0, 0.0, w * x)


def masked(x, mask):
    """`x mask`, 0 where the mask is 0; x itself where there is no mask."""
    return x if mask is None else jnp.where(mask == 0, 0.0, x * mask.astype(jnp.float32))
