"""Entropies of a router's distribution over N experts, normalised by their own maximum to [0, 1].

    Tsallis  S_q(p) = (1 - sum_i p_i^q) / (q - 1),     at most (1 - N^(1-q)) / (q - 1)
    Renyi    H_q(p) = log(sum_i p_i^q) / (1 - q),      at most log N
    Shannon  H(p)   = -sum_i p_i log p_i               at most log N;  the limit of both at q = 1

q is the index; DynMoLE (arXiv 2504.00661) decides by the first or the second.
"""

import math

import jax.numpy as jnp

from molora_jax.core.routing import permitted
from molora_jax.core.types import Array

NEAR_ONE = 1e-3  # |q - 1| below which Shannon serves: float32 loses the difference 1 - sum p^q there (9e-4 off)


def normalised(p: Array, *, kind: str, q: float, eps: float = 0.0, allowed: Array | None = None) -> Array:
    """`p [B, S, E]` -> `[B, S]`; `kind` is shannon, tsallis or renyi; `eps` is added to p first (DynMoLE's 1e-5).

    N counts the experts that are allowed (`[E]` or `[B, E]`); the others have no term. With one expert it is 0.
    An expert of p = 0 has no term and no gradient: that of `p^q` is infinite there for q < 1, and a softmax's is 0.
    """
    mask = permitted(allowed)
    N = p.shape[-1] if allowed is None else jnp.sum(mask, axis=-1).astype(p.dtype)
    mask = mask & (p + eps > 0)
    p = jnp.where(mask, p + eps, 1.0)  # 1: a harmless value where there is no term
    total = lambda terms: jnp.sum(jnp.where(mask, terms, 0.0), axis=-1)  # noqa: E731
    log_N = math.log(N) if allowed is None else jnp.log(N)
    if kind == "shannon" or abs(q - 1) < NEAR_ONE:
        value, most = -total(p * jnp.log(jnp.where(p > 0, p, 1.0))), log_N
    elif kind == "tsallis":
        value, most = (1 - total(p**q)) / (q - 1), (1 - N ** (1.0 - q)) / (q - 1)
    else:
        value, most = jnp.log(total(p**q) + 1e-10) / (1 - q), log_N
    return jnp.where(N > 1, value / jnp.where(N > 1, most, 1.0), 0.0)
