"""The gate activations of a routed FFN, split into their one transcendental and the cheap rest.

The backward wants `act(x)` and `act'(x)`; both follow from `core(x)` by a few multiplications. XLA:CPU would otherwise
evaluate the exponential again in every loop that it fuses them into.
"""

import math

import jax
import jax.numpy as jnp

_C = math.sqrt(2 / math.pi)


def _silu(x, s):
    return x * s, s * (1 + x * (1 - s))


def _gelu_core(x):
    return jnp.tanh(_C * (x + 0.044715 * (x * x * x)))


def _gelu(x, t):
    half = 0.5 * (1 + t)
    return x * half, half + 0.5 * x * (1 - t * t) * _C * (1 + 3 * 0.044715 * (x * x))


CORES = {"silu": jax.nn.sigmoid, "gelu": _gelu_core}
PAIRS = {"silu": _silu, "gelu": _gelu}


def core(activation: str, x):
    """The transcendental of `act`: the sigmoid of silu, the tanh of (the tanh form of) gelu."""
    return CORES[activation](x)


def pair(activation: str, x, c):
    """`act(x), act'(x)` from `c = core(activation, x)`."""
    return PAIRS[activation](x, c)
