"""Softmax over all experts, then the top K (Mixtral; MixLoRA arXiv 2404.15159, MoLA arXiv 2402.08562).

    p = softmax(W x),   S = the K largest of p,   g_e = p_e / sum_S p  for e in S, else 0

The same as a softmax over the K largest logits. B batch, S sequence, D width, E experts, K active.
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
    the input by U(1-j, 1+j) in training. `drop_last=1.0` is GShard's random second expert (arXiv 2006.16668): in
    training the last of the K is left out with the probability max(0, 1 - K p / sum_S p); its gate goes to nobody.
    """

    k: int = 2
    renormalise: bool = True
    jitter: float = 0.0
    drop_last: float = 0.0

    LIMITS: ClassVar = {"k": (0, None), "jitter": (0, None), "drop_last": (0, 1)}
    RANDOM: ClassVar = ("jitter", "drop_last")

    def k_max(self, experts):
        return min(self.k or experts, experts)

    def logits(self, p, x, ctx):
        """`[B, S, E]` float32 of `x [B, S, D]`."""
        return routing.logits(p["W"], x)

    def route(self, p, shared, x, ctx):
        if self.jitter and ctx.train:
            noise = jax.random.uniform(
                ctx.keyed(7), x.shape, jnp.float32, minval=1 - self.jitter, maxval=1 + self.jitter
            )
            x = x * noise.astype(x.dtype)
        z = self.logits(p, x, ctx)
        probs = routing.softmax(z, ctx.allowed)
        k = self.k_max(z.shape[-1])
        selected = routing.top_k(probs, k)
        gates = jnp.where(selected, probs, 0.0)
        if self.renormalise:
            gates = gates / jnp.sum(gates, axis=-1, keepdims=True)
        if self.drop_last and ctx.train and k > 1:
            selected &= ~self._dropped(probs, selected, k, ctx)
            gates = jnp.where(selected, gates, 0.0)
        whole = (self.renormalise or k == z.shape[-1]) and not self.drop_last
        return routing.finish(gates, selected, z, probs, ctx, k_max=k, sums_to_one=whole), ctx.carry, {}

    def _dropped(self, probs, selected, k, ctx):
        """`[B, S, E]`: the least of the selected, where the draw was against it."""
        last = selected & ~routing.top_k(probs, k - 1)
        share = probs / jnp.sum(jnp.where(selected, probs, 0.0), axis=-1, keepdims=True)
        draw = jax.random.uniform(ctx.keyed(9), probs.shape[:-1])[..., None]
        return last & (draw < self.drop_last * (1 - k * share))
