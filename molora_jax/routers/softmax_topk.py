"""Softmax over all experts, then the top K (Mixtral; MixLoRA arXiv 2404.15159, MoLA arXiv 2402.08562).

    p = softmax(W x),   S = the K largest of p,   g_e = p_e / sum_S p  for e in S, else 0

B batch, S sequence, D width, E experts, K active.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from molora_jax.core import routing
from molora_jax.routers.base import Router


@dataclasses.dataclass(frozen=True)
class SoftmaxTopK(Router):
    """`k=0` is all experts, a dense softmax (LoRAMoE); `renormalise=False` keeps `g = p` (Switch); `jitter` multiplies
    the input by U(1-j, 1+j) in training.
    """

    k: int = 2
    renormalise: bool = True
    jitter: float = 0.0

    LIMITS: ClassVar = {"k": (0, None), "jitter": (0, None)}
    RANDOM: ClassVar = ("jitter",)

    def k_max(self, experts):
        return min(self.k or experts, experts)

    def route(self, p, shared, x, ctx):
        if self.jitter and ctx.train:
            noise = jax.random.uniform(
                ctx.keyed(7), x.shape, jnp.float32, minval=1 - self.jitter, maxval=1 + self.jitter
            )
            x = x * noise.astype(x.dtype)
        z = routing.logits(p["W"], x)
        probs = routing.softmax(z, ctx.allowed)
        k = self.k_max(z.shape[-1])
        selected = routing.top_k(probs, k)
        gates = jnp.where(selected, probs, 0.0)
        if self.renormalise:
            gates = gates / jnp.sum(gates, axis=-1, keepdims=True)
        whole = self.renormalise or k == z.shape[-1]
        return routing.finish(gates, selected, z, probs, ctx, k_max=k, sums_to_one=whole), ctx.carry, {}
