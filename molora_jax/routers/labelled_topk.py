"""MeteoRA's gate: the top K of its logits, softmax over those kept (arXiv 2405.13053, section 3.2).

    z = W x,   S = the K largest of z,   g_e = exp(z_e / T) / sum_S exp(z / T)  for e in S, else 0

In training T is 1, and the same as softmax over all, top K, renormalised (the published loop). Outside it a large T
mixes the K chosen nearly evenly, as for several tasks in one prompt. With K = 1 the gate is exactly 1, and the loss of
the language model says nothing to W: `losses.task_label` teaches it. E experts, D width, K active.
"""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from molora_jax.core import routing
from molora_jax.routers.base import Router


@dataclasses.dataclass(frozen=True)
class LabelledTopK(Router):
    """`temperature` is T. `init="unit"`, the published N(0, 1): logits of size sqrt(D), nearly one-hot at the start;
    `normal` and `kaiming` (`base.py`) start even, which is kinder to the gradient through the gates.
    """

    init: Literal["unit", "normal", "kaiming"] = "unit"
    k: int = 2
    temperature: float = 1.0

    LIMITS: ClassVar = {"k": (1, None), "temperature": (0, None, "()")}
    COLLAPSES: ClassVar[bool] = False

    def k_max(self, experts):
        return min(self.k, experts)

    def init_leaves(self, key, site, layer):
        if self.init == "unit":
            return {"W": jax.random.normal(key, (site.experts, site.d_in))}
        return super().init_leaves(key, site, layer)

    def route(self, p, shared, x, ctx):
        z = routing.logits(p["W"], x)
        mask, k = routing.permitted(ctx.allowed), self.k_max(z.shape[-1])
        selected = routing.top_k(jnp.where(mask, z, routing.NEG_INF), k) & mask
        cool = z if ctx.train else z / self.temperature
        gates = jax.nn.softmax(jnp.where(selected, cool, routing.NEG_INF), axis=-1)
        probs = routing.softmax(z, ctx.allowed)
        return routing.finish(gates, selected, z, probs, ctx, k_max=k, sums_to_one=True), ctx.carry, {}
