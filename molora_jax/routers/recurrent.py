"""RMoE: a router that decides from a GRU state which runs over the layers, for each token alone (arXiv 2408.06793).

    x' = V_i x                                              V_i [P, D] a layer's own projection
    s = sigmoid(W_s x' + b_s + U_s h + c_s)                 h = h_{i-1} of the layer before, h_0 = 0
    z = sigmoid(W_z x' + b_z + U_z h + c_z)                 W, U [P, P], b, c [P]: one GRU for all layers
    n = tanh(W_n x' + b_n + s (U_n h + c_n))
    h_i = (1 - z) n + z h,     g = top-K of softmax(G_i h_i)     G_i [E, P] (leaf `W`)

Experts still see x. The state passes over layers without experts untouched; in generation it starts from 0 for each
token, so nothing is cached. Nothing stops the gradient: that it flows through h to lower layers is the method
(`mode="detach"` stops it, `mode="np"` feeds h_0 to every layer; the paper's ablations). With `share="site"` h advances
once a projection, in the decoder's order; the paper's block has one router step a layer: share `ffn`.
B batch, S sequence, D width, P GRU width, E experts.
"""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from molora_jax.core.routing import exact
from molora_jax.routers.softmax_topk import SoftmaxTopK


def gru(x, h, W, U, b, c):
    """The standard cell (reset after the product): `x, h [..., P]`, `W, U [3, P, P]`, `b, c [3, P]`; s, z, n."""
    a = exact("...p,gqp->g...q", x, W) + b.reshape(3, *(1,) * (x.ndim - 1), -1)
    r = exact("...p,gqp->g...q", h, U) + c.reshape(3, *(1,) * (x.ndim - 1), -1)
    s, z = jax.nn.sigmoid(a[0] + r[0]), jax.nn.sigmoid(a[1] + r[1])
    return (1 - z) * jnp.tanh(a[2] + s * r[2]) + z * h


@dataclasses.dataclass(frozen=True)
class Recurrent(SoftmaxTopK):
    """`renormalise=False` is the paper's text (gates are the plain probabilities); True is its Hugging Face code."""

    renormalise: bool = False
    hidden: int = 128  # P
    mode: Literal["full", "detach", "np"] = "full"

    LIMITS: ClassVar = {"hidden": (1, None)}

    def init_leaves(self, key, site, layer):
        key_proj, key_gate = jax.random.split(key)
        width = dataclasses.replace(site, d_in=self.hidden)
        proj = super().init_leaves(key_proj, dataclasses.replace(site, experts=self.hidden), layer)["W"]
        return {"proj": proj, "W": super().init_leaves(key_gate, width, layer)["W"]}

    def init_shared(self, key, sites):
        P = self.hidden
        shapes = {"gru_W": (3, P, P), "gru_U": (3, P, P), "gru_b": (3, P), "gru_c": (3, P)}
        keys = jax.random.split(key, len(shapes))
        draw = lambda key, shape: jax.random.uniform(key, shape, minval=-(P**-0.5), maxval=P**-0.5)  # noqa: E731
        return {name: draw(k, shape) for k, (name, shape) in zip(keys, shapes.items(), strict=True)}

    def init_carry(self, batch, length):
        return jnp.zeros((batch, length, self.hidden))

    def route(self, p, shared, x, ctx):
        h = ctx.carry
        if self.mode == "np":
            h = jnp.zeros_like(h)
        elif self.mode == "detach":
            h = jax.lax.stop_gradient(h)
        projected = exact("bsd,pd->bsp", x.astype(jnp.float32), p["proj"])
        h = gru(projected, h, shared["gru_W"], shared["gru_U"], shared["gru_b"], shared["gru_c"])
        decision, _, sums = super().route(p, shared, h, ctx)
        return decision, h, sums
