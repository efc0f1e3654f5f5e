"""All experts in training, the K strongest in use (LoRA-Mixer, arXiv 2507.00029).

    p = softmax(W x);   training: g = p, every expert;   else S = the K largest of p,  g_e = p_e / sum_S p  for e in S

The two differ by what the left-out experts would have said: with K = E, or `hard="never"`, use is as training. No text
says whether the kept ones are renormalised. Which tasks' experts a stage trains is the stage's (`route="task"`).
B batch, S sequence, D width, E experts.
"""

import dataclasses
from typing import ClassVar, Literal

import jax.numpy as jnp

from molora_jax.core import routing
from molora_jax.routers.base import Router


@dataclasses.dataclass(frozen=True)
class SoftTopK(Router):
    """`hard="eval"`: K experts outside training; `"never"`: all, there too. `renormalise`: gates of the K sum to 1."""

    k: int = 3
    renormalise: bool = True
    hard: Literal["eval", "never"] = "eval"

    LIMITS: ClassVar = {"k": (1, None)}

    def k_max(self, experts):
        return experts

    def route(self, p, shared, x, ctx):
        z = routing.logits(p["W"], x)
        probs, E = routing.softmax(z, ctx.allowed), z.shape[-1]
        k = E if ctx.train or self.hard == "never" else min(self.k, E)
        selected = routing.top_k(jnp.where(routing.permitted(ctx.allowed), z, routing.NEG_INF), k)
        gates = jnp.where(selected, probs, 0.0)
        if self.renormalise and k < E:
            gates = routing.normalised(gates)
        whole = self.renormalise or k == E
        return routing.finish(gates, selected, z, probs, ctx, k_max=k, sums_to_one=whole), ctx.carry, {}
