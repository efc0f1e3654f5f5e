"""Sigmoid scores with a load bias, top K, gates that sum to K (SMoRA, arXiv 2501.15103; the bias as in loss-free MoE).

    s = sigmoid(W x),  q = s + b,  I = the K largest q,    g_i = K h_i / sum_I h_j  (i in I),  h = q or s
    b_i <- b_i + u sign(mean(count) - count_i)             once a step, no gradient; count_i: tokens that chose i

With single-rank experts (`adapter.rank=1`, E = r) this is one LoRA whose every rank is an expert; with `rank=c` it is
the block version (E = r / c, the same K c active ranks), with b a value a block. SMoRA scales by alpha over the
*active* rank K c, so its adapter's alpha here (`alpha / rank` is the scale) is SMoRA's alpha divided by K.
E experts (ranks or blocks), K active.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from molora_jax.core import lowrank, routing
from molora_jax.routers.base import Router


@dataclasses.dataclass(frozen=True)
class SigmoidTopK(Router):
    """`bias_rate` is u. `bias_in_gate`: h = q as in SMoRA's code; False leaves b to the choice alone (DeepSeek-V3).

    `input_dropout`: the router reads the adapter's dropped input, as in SMoRA's code; with `share="site"` it is the
    very same mask. Scores are float32: ties among ranks would be decided by index in bf16.
    """

    k: int = 8
    bias_rate: float = 1e-5
    bias_in_gate: bool = True
    input_dropout: bool = True

    LIMITS: ClassVar = {"k": (1, None), "bias_rate": (0.0, None)}

    def k_max(self, experts):
        return min(self.k, experts)

    def init_state(self, site):
        return {"b": jnp.zeros(site.experts)}

    def route(self, p, shared, x, ctx):
        if self.input_dropout:
            flat = x.reshape(-1, x.shape[-1])
            x = lowrank.dropped(flat, lowrank.dropout(ctx.keyed(), ctx.dropout), jnp.arange(len(flat))).reshape(x.shape)
        z = routing.logits(p["W"], x)
        mask = routing.permitted(ctx.allowed)
        score = jnp.where(mask, jax.nn.sigmoid(z), 0.0)
        q = score + ctx.state["b"]
        selected = routing.top_k(jnp.where(mask, q, routing.NEG_INF), self.k) & mask
        h = jnp.where(selected, q if self.bias_in_gate else score, 0.0)
        gates = jnp.sum(selected, axis=-1, keepdims=True) * routing.normalised(h)
        probs = routing.normalised(score)  # for statistics and losses: a distribution
        decision = routing.finish(gates, selected, z, probs, ctx, k_max=self.k_max(z.shape[-1]))
        return decision, ctx.carry, {"count": routing.counts(decision)}

    def update(self, state, sums):
        return {"b": routing.with_load(state["b"], sums["count"], self.bias_rate)}
