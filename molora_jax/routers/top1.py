"""Top-1 without a gate factor (LLaVA-MoLE, arXiv 2401.16160).

    p = softmax(W x + b),  e* = argmax p;    g_e = 1 for e*, else 0          (`dense=True`: g = p, all experts)

A balance loss counts e* in either mode (`Routing.chosen`): counting all E would hold it at a constant.
The chosen expert is not multiplied by its probability, so the language-model loss gives the router exactly no gradient:
only the balance loss trains it, and the hidden states' drift moves the choices. `gated=True` multiplies by p (Switch);
`straight_through=True` keeps the gate 1 and sends the gradient that p would have had: g = 1 + p - stop(p).
E experts, D width.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from molora_jax.core import routing
from molora_jax.routers.base import Router


@dataclasses.dataclass(frozen=True)
class Top1(Router):
    """`bias`: the reference's router is a default linear layer with a bias; its init is U(+-1/sqrt(D)) like W's."""

    bias: bool = True
    gated: bool = False
    dense: bool = False
    straight_through: bool = False

    REFUSES: ClassVar = (
        ("router.straight_through", (("router.straight_through", "is", True), ("router.gated", "is", True)),
         "False with router.gated, whose gates have a gradient of their own", "Leave one of them out."),
        ("router.straight_through", (("router.straight_through", "is", True), ("router.dense", "is", True)),
         "False with router.dense, whose gates have a gradient of their own", "Leave one of them out."),
    )  # fmt: skip

    def k_max(self, experts):
        return experts if self.dense else 1

    def init_leaves(self, key, site, layer):
        leaves = super().init_leaves(key, site, layer)
        if self.bias:
            bound = site.d_in**-0.5 if self.init == "kaiming" else 0.0
            leaves["b"] = bound * jax.random.uniform(jax.random.fold_in(key, 1), (site.experts,), minval=-1, maxval=1)
        return leaves

    def route(self, p, shared, x, ctx):
        z = routing.logits(p["W"], x, p.get("b"))
        probs = routing.softmax(z, ctx.allowed)
        k = self.k_max(z.shape[-1])
        selected = routing.top_k(probs, k)
        one = 1.0 + probs - jax.lax.stop_gradient(probs) if self.straight_through else 1.0
        gates = jnp.where(selected, probs if self.dense or self.gated else one, 0.0)
        chosen = routing.top_k(probs, 1) if self.dense else None
        decision = routing.finish(
            gates, selected, z, probs, ctx, k_max=k, chosen=chosen, sums_to_one=self.dense or not self.gated
        )
        return decision, ctx.carry, {}
