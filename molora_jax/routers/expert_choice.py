"""Expert choice: each expert takes its best tokens of an example (Zhou et al. 2022, arXiv 2202.09368).

    p_t = softmax(W x_t) over experts;   expert e takes the C tokens of the example with the largest p_{t,e}
    C = ceil(n k / E), n the example's tokens;     g_{t,e} = p_{t,e} where t was taken, else 0

Every expert works alike by construction, and a token has 0 to E experts, k on average. Whether a token is taken depends
on the tokens behind it: it is for bases that read both ways, and refused where the base predicts the next token. The
pool is an example, not the batch as published, so that no example changes another. B batch, S sequence, E experts.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from molora_jax.core import routing
from molora_jax.routers.base import Router


@dataclasses.dataclass(frozen=True)
class ExpertChoice(Router):
    """`k`: the experts of a token, on average (the paper's capacity factor)."""

    k: float = 2.0

    LIMITS: ClassVar = {"k": (0, None, "()")}
    CAUSAL: ClassVar[bool] = False

    def k_max(self, experts):
        return experts

    def route(self, p, shared, x, ctx):
        z = routing.logits(p["W"], x)
        probs = routing.softmax(z, ctx.allowed)
        selected = self._taken(jax.lax.stop_gradient(probs), ctx)
        gates = jnp.where(selected, probs, 0.0)
        return routing.finish(gates, selected, z, probs, ctx, k_max=z.shape[-1]), ctx.carry, {}

    def _taken(self, probs, ctx):
        S = probs.shape[1]
        same = (ctx.segment_ids[:, :, None] == ctx.segment_ids[:, None, :]) & ctx.valid[:, None, :]  # [B, S, S]
        ahead = probs[:, None] > probs[:, :, None]  # [B, t, other, E]
        ties = (probs[:, None] == probs[:, :, None]) & (jnp.arange(S)[:, None] > jnp.arange(S))[..., None]
        rank = jnp.sum(same[..., None] & (ahead | ties), axis=2)
        experts = routing.places(ctx.allowed, probs.shape[-1])[1]
        n = jnp.sum(same, axis=-1)[..., None]
        return rank < jnp.ceil(n * self.k / jnp.maximum(experts, 1))
