"""The two factors of a base expert's hidden state `h = a(g) b(u)`, each with its derivative.

clamped   a(g) = m sigmoid(1.702 m), m = min(g, 7);   b(u) = clip(u, -7, 7) + 1       (gpt-oss)
others    a as `routed_ffn/activations.py` has it;    b(u) = u
"""

import jax
import jax.numpy as jnp

from kernels_pallas.routed_ffn.activations import PAIRS, core, pair

SLOPE, LIMIT = 1.702, 7.0
NAMES = (*PAIRS, "clamped")


def gate(activation: str, g):
    """`a(g), a'(g)`."""
    if activation != "clamped":
        return pair(activation, g, core(activation, g))
    m = jnp.minimum(g, LIMIT)
    s = jax.nn.sigmoid(SLOPE * m)
    return m * s, jnp.where(g <= LIMIT, s * (1 + SLOPE * m * (1 - s)), 0.0)


def linear(activation: str, u):
    """`b(u), b'(u)`; the derivative is None where it is 1."""
    if activation != "clamped":
        return u, None
    return jnp.clip(u, -LIMIT, LIMIT) + 1, jnp.where(jnp.abs(u) <= LIMIT, 1.0, 0.0)
