"""The gate activations of a routed FFN, split into their one transcendental and the cheap rest.

The backward wants `act(x)` and `act'(x)`; both follow from `core(x)` by a few multiplications (the derivative of the
exact gelu needs an exponential beside). XLA:CPU would otherwise evaluate the transcendental again in every loop that it
fuses them into.

    silu       x sigmoid(x)
    gelu       x (1 + erf(x / sqrt 2)) / 2
    gelu_tanh  x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2
    relu       x where x > 0
"""

import math

import jax
import jax.numpy as jnp

_C = math.sqrt(2 / math.pi)


def _silu(x, s):
    return x * s, s * (1 + x * (1 - s))


def _erf(x):
    return jax.lax.erf(x * math.sqrt(0.5))


def _gelu(x, c):
    half = 0.5 * (1 + c)
    return x * half, half + x * jnp.exp(-0.5 * (x * x)) * (1 / math.sqrt(2 * math.pi))


def _tanh(x):
    return jnp.tanh(_C * (x + 0.044715 * (x * x * x)))


def _gelu_tanh(x, t):
    half = 0.5 * (1 + t)
    return x * half, half + 0.5 * x * (1 - t * t) * _C * (1 + 3 * 0.044715 * (x * x))


def _positive(x):
    return jnp.where(x > 0, 1.0, 0.0).astype(x.dtype)


def _relu(x, c):
    return x * c, c


CORES = {"silu": jax.nn.sigmoid, "gelu": _erf, "gelu_tanh": _tanh, "relu": _positive}
PAIRS = {"silu": _silu, "gelu": _gelu, "gelu_tanh": _gelu_tanh, "relu": _relu}


def core(activation: str, x):
    """The transcendental of `act`: a sigmoid, an erf, a tanh (for relu the step)."""
    return CORES[activation](x)


def pair(activation: str, x, c):
    """`act(x), act'(x)` from `c = core(activation, x)`."""
    return PAIRS[activation](x, c)
