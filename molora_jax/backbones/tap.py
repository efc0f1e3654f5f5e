"""A zero that is added to the kernels of one layer, so that its gradient is that of these kernels and of no others.

    W -> W + 1[layer = tapped] dW,   dW = 0 [D_in, D_out];      d loss / d dW = d loss / d W_tapped

The zero goes through the layers beside the activations, unchanged: on the way back its cotangent is one sum that every
layer passes on and the tapped one adds to. So whichever layer is asked for (it may be traced: one program serves all),
there is one array of a layer's size, and a pass can go on with the sum of another.
"""

import dataclasses

import jax
import jax.numpy as jnp

from molora_jax.core.quant import dense
from molora_jax.core.types import Array


@dataclasses.dataclass
class Tap:
    """`layer`: absolute; `zeros`: site -> `[D_in, D_out]`, float32. After the pass `zeros` are what came out of the
    last layer: the cotangent put in there is what the gradient is added to."""

    layer: Array | int
    zeros: dict[str, Array]

    def kernels(self, layer: Array, base: dict, zeros: dict) -> tuple[dict, dict]:
        """`base`, the parameters of `layer`, with the zeros on the sites that are asked for, and the zeros."""
        for site in zeros:
            kernel, out = _tapped(dense(base[site]["kernel"]), zeros[site], layer == self.layer)
            base, zeros = base | {site: base[site] | {"kernel": kernel}}, zeros | {site: out}
        return base, zeros


@jax.custom_vjp
def _tapped(W, dW, on):
    """`(W + on dW, dW)` for a dW that is 0, without the sum."""
    return W, dW


def _forward(W, dW, on):
    return (W, dW), on


def _backward(on, cotangents):
    W, dW = cotangents
    return W, dW + jnp.where(on, W.astype(dW.dtype), 0), None


_tapped.defvjp(_forward, _backward)
