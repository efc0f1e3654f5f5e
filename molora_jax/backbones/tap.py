"""Zeros that are added to the kernels of a few layers, so that their gradient is that of these kernels and no others.

    W_l -> W_l + 1[first <= l < first + n] dW_(l - first),   dW = 0 [n, D_in, D_out];   d loss / d dW_i = d loss / d W_l

The zeros go through the layers beside the activations, unchanged: on the way back their cotangent is one stack of sums
that every layer passes on and a tapped one adds to. So whichever layers are asked for (the first may be traced: one
program serves all), there are n arrays of a layer's size, and a pass can go on with the sums of another.
"""

import dataclasses

import jax
import jax.numpy as jnp

from molora_jax.core.quant import dense
from molora_jax.core.types import Array


@dataclasses.dataclass
class Tap:
    """`first`: the first layer, absolute; `zeros`: site -> `[n, D_in, D_out]`, float32. After the pass `zeros` are what
    came out of the last layer: the cotangent put in there is what the gradient is added to."""

    first: Array | int
    zeros: dict[str, Array]

    def kernels(self, layer: Array, base: dict, zeros: dict) -> tuple[dict, dict]:
        """`base`, the parameters of `layer`, with the zeros on the sites that are asked for, and the zeros."""
        for site in zeros:
            kernel, out = _tapped(dense(base[site]["kernel"]), zeros[site], layer - self.first)
            base, zeros = base | {site: base[site] | {"kernel": kernel}}, zeros | {site: out}
        return base, zeros


@jax.custom_vjp
def _tapped(W, dW, at):
    """`(W + dW[at], dW)` for a dW that is 0, without the sum; W alone where `at` is none of dW's."""
    return W, dW


def _forward(W, dW, at):
    return (W, dW), at


def _backward(at, cotangents):
    W, dW = cotangents
    tapped, place = (at >= 0) & (at < len(dW)), jnp.clip(at, 0, len(dW) - 1)
    return W, dW.at[place].add(jnp.where(tapped, W.astype(dW.dtype), 0)), None


_tapped.defvjp(_forward, _backward)
