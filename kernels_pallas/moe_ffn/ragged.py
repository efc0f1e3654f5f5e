"""The routed FFN of a base by experts: rows in the order of their experts, grouped products of `jax.lax.ragged_dot`.

For a TPU, where that is a kernel of the compiler's own. Everywhere else it is written out as one product with all
experts for each slot. The kernels are frozen: they get no gradient. Only the inputs are kept for the backward, which
forms the hidden states `[N, F]` again.

T tokens, K slots of a token, N = T*K slots, D width, F FFN width, E experts, R rank.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kernels_pallas import order
from kernels_pallas.moe_ffn import gates as gating
from kernels_pallas.tiles import PRODUCT
from kernels_pallas.zeros import gated, masked

F32 = jnp.float32


@jax.custom_vjp
def _weigh(w, y):
    """`w y`; 0 where w is 0, which still has its gradient. `w [N, 1]`, `y [N, D]`."""
    return gated(w, y)


_weigh.defvjp(
    lambda w, y: (gated(w, y), (w, y)),
    lambda saved, d: (jnp.sum(d * saved[1], axis=1, keepdims=True), gated(saved[0], d)),
)


class _Rows:
    """Products of sorted rows with what their expert has; rows past the last expert are exactly zero."""

    def __init__(self, rows: order.Order):
        E = len(rows.sizes)
        self.sizes, self.expert, self.used = rows.sizes, jnp.minimum(rows.expert, E - 1), (rows.expert < E)[:, None]

    def only(self, x):
        return jnp.where(self.used, x, 0)

    def dot(self, x, W):
        """`x [N, A]`, `W [1|E, A, B]` -> `[N, B]` float32."""
        x, W = self.only(x), W.astype(x.dtype)
        if W.shape[0] == 1 and len(self.sizes) > 1:
            return jnp.dot(x, W[0], preferred_element_type=F32)
        return self.only(jax.lax.ragged_dot(x, W, self.sizes, preferred_element_type=F32))

    def biased(self, y, bias, i):
        """`y [N, B]` with the bias of its row's expert, of `bias[i] [E, B]`; as it is without biases."""
        return y if bias is None else self.only(y + bias[i][self.expert].astype(F32))


@functools.partial(jax.checkpoint, static_argnums=(0,))
@jax.named_scope("base_experts")
def _block(activation, x, kernels, low, idx, gates, mask, bias):
    rows, dtype = order.by_expert(idx, kernels[0].shape[0]), x.dtype
    own, x = _Rows(rows), order.spread(x, rows)
    g, u = (own.biased(own.dot(x, kernels[i]), bias, i) for i in (0, 1))
    if low is not None:
        z_g, z_u = (order.arrange(z.astype(dtype), rows) for z in low[:2])
        g, u = g + own.dot(z_g, low[2]), u + own.dot(z_u, low[3])
    h = gating.gate(activation, g)[0] * gating.linear(activation, u)[0]
    w = own.only(order.arrange(gates.astype(F32)[..., None], rows))
    out = own.biased(own.dot(h.astype(dtype), kernels[2]), bias, 2)
    y = order.combine(_weigh(w, out), rows).astype(dtype)
    if low is None:
        return y, None
    seen = masked(h, None if mask is None else order.spread(mask, rows))
    z_d = own.dot(seen.astype(dtype), jnp.swapaxes(low[4], 1, 2))
    return y, order.restore(z_d, rows).astype(dtype)


def moe_ffn(x, gate, up, down, low, idx, gates, *, activation="silu", mask=None, bias=None):
    kernels, bias = jax.lax.stop_gradient(((gate, up, down), bias))
    out = _block(activation, x, kernels, low, idx, gates, mask, bias)
    return jax.tree.map(lambda made: checkpoint_name(made, PRODUCT), out)
