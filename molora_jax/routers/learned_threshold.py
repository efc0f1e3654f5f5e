"""AdaMoLE: experts whose probability reaches a threshold of the token's own, by their excess (arXiv 2405.00361).

    p = softmax(W x),  tau = tau_max sigmoid(w x + b),   g_e = max(p_e - tau, 0) / sum_j max(p_j - tau, 0)

With tau_max <= 1/E a token has at least one expert and its gates sum to 1; above, a token may have none. tau -> 0 is
the dense softmax mixture. A token of one expert has g = 1 and teaches neither W nor w.
B batch, S sequence, D width, E experts.
"""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from molora_jax.core import routing
from molora_jax.routers.base import Router


@dataclasses.dataclass(frozen=True)
class LearnedThreshold(Router):
    """`ceiling` is tau_max E: the largest threshold, in units of the uniform probability 1/E (of those allowed).

    `balance_on`: the balance loss averages p - tau, negative entries too, as AdaMoLE's code does (it then also pushes
    the threshold up), or p, as Switch. Float32 throughout: selections near tau flip in bf16.
    """

    ceiling: float = 1.0
    balance_on: Literal["excess", "probs"] = "excess"

    LIMITS: ClassVar = {"ceiling": (0, None)}

    def k_max(self, experts):
        return experts

    def init_leaves(self, key, site, layer):
        bound = site.d_in**-0.5  # torch's default linear: tau starts near half of tau_max
        draw = lambda n, *shape: jax.random.uniform(jax.random.fold_in(key, n), shape, minval=-bound, maxval=bound)  # noqa: E731
        return super().init_leaves(key, site, layer) | {"w_tau": draw(1, 1, site.d_in), "b_tau": draw(2, 1)}

    def route(self, p, shared, x, ctx):
        z = routing.logits(p["W"], x)
        probs = routing.softmax(z, ctx.allowed)
        allowed = jnp.sum(jnp.broadcast_to(routing.permitted(ctx.allowed), z.shape), axis=-1, keepdims=True)
        tau = self.ceiling / jnp.maximum(allowed, 1) * jax.nn.sigmoid(routing.logits(p["w_tau"], x, p["b_tau"]))
        excess = probs - tau
        selected = excess >= 0  # at the threshold an expert counts, with a gate of 0
        kept = jnp.where(selected, excess, 0.0)
        total = jnp.sum(kept, axis=-1, keepdims=True)
        nobody = total == 0
        gates = kept / jnp.where(nobody, 1.0, total)
        decision = routing.finish(
            gates, selected, z, probs, ctx, k_max=self.k_max(z.shape[-1]), base=nobody[..., 0],
            averaged=excess if self.balance_on == "excess" else None,
        )  # fmt: skip
        return decision, ctx.carry, {}
