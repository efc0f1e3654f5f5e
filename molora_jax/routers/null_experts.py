"""AdaMoE: some of a token's K choices may be experts that do nothing (Zeng et al. 2024, arXiv 2406.13233).

    p = softmax over E experts and N null ones of [W; W_null] x,   S = the K largest of all E + N
    g_e = p_e / sum of p over the true experts of S;   a token whose S is all null has no expert

K counts null choices, so a token uses 0 to K experts. `Routing.cost` is K sum_e p_e, the true experts that it would
use if it drew them: with `losses.router_cost=dict(target=...)` their mean is held (the paper puts the null experts'
average load into its balance loss instead). `probs` are those among the true experts.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from molora_jax.core import routing
from molora_jax.routers.base import Router


@dataclasses.dataclass(frozen=True)
class NullExperts(Router):
    """`null` is N. `renormalise=False`: gates are p itself, over all E + N."""

    k: int = 3
    null: int = 4
    renormalise: bool = True

    LIMITS: ClassVar = {"k": (1, None), "null": (1, None)}

    def k_max(self, experts):
        return min(self.k, experts)

    def init_leaves(self, key, site, layer):
        own, keys = super().init_leaves, jax.random.split(key)
        null = dataclasses.replace(site, experts=self.null)
        return own(keys[0], site, layer) | {"W_null": own(keys[1], null, layer)["W"]}

    def route(self, p, shared, x, ctx):
        z, none = routing.logits(p["W"], x), routing.logits(p["W_null"], x)
        E = z.shape[-1]
        open_ = jnp.broadcast_to(routing.permitted(ctx.allowed), z.shape)
        every = jnp.concatenate([jnp.where(open_, z, routing.NEG_INF), none], axis=-1)
        own = jax.nn.softmax(every, axis=-1)[..., :E]
        selected = routing.top_k(every, self.k)[..., :E] & open_
        if self.renormalise:  # of logits: beside a null expert that is far ahead, p itself would underflow
            own_share = jax.nn.softmax(jnp.where(selected, z, routing.NEG_INF), axis=-1)
        gates = jnp.where(selected, own_share if self.renormalise else own, 0.0)
        decision = routing.finish(
            gates, selected, z, routing.softmax(z, ctx.allowed), ctx, k_max=self.k_max(E),
            sums_to_one=self.renormalise,
        ).replace(cost=self.k * jnp.sum(jnp.where(open_, own, 0.0), axis=-1))  # fmt: skip
        return decision, ctx.carry, {}
