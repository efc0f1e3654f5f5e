"""Noisy top-K gating (Shazeer et al. 2017, arXiv 1701.06538, eq. 3 to 5), and how probable each choice was.

    H_i = (W x)_i + n sigma_i eps_i,   eps ~ N(0, 1),  sigma_i = softplus((W_noise x)_i) + 0.01      in training
    S = the K largest H,   g = softmax over S of H,   0 elsewhere                       (H = W x outside training)
    P(x, i) = Phi((W x)_i - kth(H, K, i)) / (n sigma_i)),   kth(H, K, i): the K-th largest H without i

P (`Routing.reach`) is the chance that i is chosen once more when its noise alone is drawn anew: a load with a gradient,
which the loss `load` reads. `learned=False` is V-MoE's noise (arXiv 2106.05974): sigma = 1 / E. E experts, K active.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from molora_jax.core import routing
from molora_jax.routers.base import Router


def kth_without(H, k):
    """`[..., E]`: the K-th largest of `H [..., E]` without entry i; `NEG_INF` where only K - 1 others are."""
    E = H.shape[-1]
    if k >= E:
        return jnp.full(H.shape, routing.NEG_INF)
    ranked = -jnp.sort(-H, axis=-1)
    return jnp.where(routing.top_k(H, k), ranked[..., k : k + 1], ranked[..., k - 1 : k])


@dataclasses.dataclass(frozen=True)
class NoisyTopK(Router):
    """`noise` is n: 1 as published, 0 is plain top-K, whose P then takes sigma = 1 / E. W_noise starts at 0."""

    k: int = 2
    noise: float = 1.0
    learned: bool = True

    LIMITS: ClassVar = {"k": (1, None), "noise": (0, None)}
    RANDOM: ClassVar = ("noise",)

    def k_max(self, experts):
        return min(self.k, experts)

    def init_leaves(self, key, site, layer):
        leaves = super().init_leaves(key, site, layer)
        return leaves | ({"W_noise": jnp.zeros_like(leaves["W"])} if self.learned and self.noise else {})

    def route(self, p, shared, x, ctx):
        open_ = jnp.broadcast_to(routing.permitted(ctx.allowed), (*x.shape[:-1], len(p["W"])))
        z = routing.logits(p["W"], x)
        count = jnp.sum(open_, axis=-1, keepdims=True)
        sigma = 1 / jnp.maximum(count, 1).astype(jnp.float32)
        if "W_noise" in p:
            sigma = jax.nn.softplus(routing.logits(p["W_noise"], x)) + 1e-2
        sigma = jnp.broadcast_to(sigma * (self.noise or 1.0), z.shape)
        H = z
        if self.noise and ctx.train:
            H = z + sigma * jax.random.normal(ctx.keyed(8), z.shape)
        H = jnp.where(open_, H, routing.NEG_INF)
        k = self.k_max(z.shape[-1])
        selected = routing.top_k(H, k) & open_
        gates = jnp.where(selected, jax.nn.softmax(jnp.where(selected, H, routing.NEG_INF), axis=-1), 0.0)
        margin = jnp.where(open_, (z - kth_without(H, k)) / sigma, -30.0)
        reach = jnp.where(open_, jax.scipy.stats.norm.cdf(jnp.clip(margin, -30.0, 30.0)), 0.0)
        decision = routing.finish(
            gates, selected, z, routing.softmax(H, ctx.allowed), ctx, k_max=k, sums_to_one=True
        ).replace(reach=reach)
        return decision, ctx.carry, {}
