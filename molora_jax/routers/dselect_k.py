"""DSelect-k: K selectors of binary codes by a smooth step, differentiable everywhere (arXiv 2106.03760).

    r_i(e) = prod_j  S(z_ij) where bit j of e is 1, else 1 - S(z_ij);    g = sum_i w_i r_i,  w = softmax(V x)
    S(t) = 0 below -gamma/2, 1 above gamma/2, -2 t^3 / gamma^3 + 3 t / (2 gamma) + 1/2 between,    z = Z x

An expert's code is its number in ceil(log2 E) bits. A selector that has decided all its bits is one expert, so K
experts act in the end; before that a token may use all. Codes of no expert, or of one that is shut out, are left out
and the rest renormalised (the paper's code adds a penalty for them instead). `Routing.cost` is the mean entropy of the
selectors: the loss `router_cost` on it is the paper's regulariser. E experts, K selectors, D width.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from molora_jax.core import routing
from molora_jax.routers.base import Router


def smooth_step(t, gamma):
    inside = -2 * t**3 / gamma**3 + 3 * t / (2 * gamma) + 0.5
    return jnp.where(t <= -gamma / 2, 0.0, jnp.where(t >= gamma / 2, 1.0, inside))


def bits(E):
    """`[E, m]` bool: the code of each expert."""
    m = max((E - 1).bit_length(), 1)
    return (np.arange(E)[:, None] >> np.arange(m)) % 2 == 1


@dataclasses.dataclass(frozen=True)
class DSelectK(Router):
    """`gamma`: the width of the step. Where all bits are decided the router has no gradient any more."""

    k: int = 2
    gamma: float = 1.0

    LIMITS: ClassVar = {"k": (1, None), "gamma": (0, None, "()")}

    def k_max(self, experts):
        return experts

    def init_leaves(self, key, site, layer):
        own, keys = super().init_leaves, jax.random.split(key)
        m = bits(site.experts).shape[1]
        return {
            "W": own(keys[0], dataclasses.replace(site, experts=self.k), layer)["W"],
            "Z": own(keys[1], dataclasses.replace(site, experts=self.k * m), layer)["W"],
        }

    def route(self, p, shared, x, ctx):
        code = bits(ctx.site.experts)
        E, m = code.shape
        t = smooth_step(routing.logits(p["Z"], x).reshape(*x.shape[:-1], self.k, 1, m), self.gamma)
        r = jnp.prod(jnp.where(code, t, 1 - t), axis=-1)  # [B, S, K, E]
        open_ = jnp.broadcast_to(routing.permitted(ctx.allowed), (*x.shape[:-1], E))
        r = routing.normalised(jnp.where(open_[..., None, :], r, 0.0))
        w = jax.nn.softmax(routing.logits(p["W"], x), axis=-1)
        gates = jnp.sum(w[..., None] * r, axis=-2)
        entropy = -jnp.sum(jnp.where(r > 0, r * jnp.log(jnp.where(r > 0, r, 1.0)), 0.0), axis=-1)
        z = jnp.log(jnp.maximum(gates, 1e-30))
        decision = routing.finish(gates, gates > 0, z, gates, ctx, k_max=E).replace(cost=jnp.mean(entropy, axis=-1))
        return decision, ctx.carry, {}
