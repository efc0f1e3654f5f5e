"""One gate for all layers over a whole sequence, soft in training, hard in use (SteloCoder, arXiv 2310.15539).

    z_t = W x_t (x the embedding, before any block),   Z_e = max over the tokens t of an example of z_{t,e}
    w = softmax(Z);   training: g = w, dense;   else g = one-hot of argmax w, for all tokens and layers

The maximum is each expert's own, and padding is left out. `pool="mean"` with `hard="never"` is expert merging (SMEAR,
Muqeeth et al. 2023, arXiv 2306.03745) for LoRA: of gates that an example's tokens share, sum_e w_e (B_e A_e x) is
(sum_e w_e B_e A_e) x, one merged adapter an example (in a routed FFN it is a mixture, not a merge).

An example's tokens are seen before they are predicted, so in decoding the prompt alone decides, once, for the whole
answer (SETTLES; the paper's `set_expert`). x has no position where the base's positions are rotary. E experts.
"""

import dataclasses
from typing import ClassVar, Literal

import jax.numpy as jnp

from molora_jax.core import routing
from molora_jax.routers.base import Router


@dataclasses.dataclass(frozen=True)
class SequenceGate(Router):
    """`hard="eval"`: one expert outside training, as published; `"never"`: soft there too.

    `pool_padding`: the maximum takes in a row's padding, as in the code, by which its length changes the choice.
    """

    share: Literal["model"] = "model"
    init: Literal["normal", "kaiming"] = "kaiming"
    hard: Literal["eval", "never"] = "eval"
    pool_padding: bool = False
    pool: Literal["max", "mean"] = "max"

    SETTLES: ClassVar[bool] = True

    def k_max(self, experts):
        return experts

    def route(self, p, shared, x, ctx):
        top = pooled(routing.logits(p["W"], x), ctx, padding=self.pool_padding, pool=self.pool)
        probs = routing.softmax(top, ctx.allowed)
        selected = jnp.ones(probs.shape, bool)
        gates = probs
        if self.hard == "eval" and not ctx.train:
            selected = routing.top_k(probs, 1)
            gates = selected.astype(jnp.float32)
        decision = routing.finish(gates, selected, top, probs, ctx, k_max=top.shape[-1], sums_to_one=True)
        return decision, ctx.carry, {}


def pooled(z, ctx, *, padding: bool = False, pool: str = "max"):
    """Largest (or mean) `z [B, S, E]` of each token's example: `[B, S, E]`."""
    numbers = jnp.arange(1, ctx.max_segments + 1)
    own = ctx.segment_ids[:, None, :] == numbers[:, None]  # [B, N, S]
    own |= padding & (ctx.segment_ids == 0)[:, None, :]
    if pool == "max":
        most = jnp.max(jnp.where(own[..., None], z[:, None], routing.NEG_INF), axis=2)  # [B, N, E]
    else:
        total = routing.exact("bns,bse->bne", own.astype(z.dtype), z)
        most = total / jnp.maximum(jnp.sum(own, axis=-1), 1)[..., None]
    place = jnp.clip(ctx.segment_ids - 1, 0)[..., None]
    return jnp.where(ctx.valid[..., None], jnp.take_along_axis(most, place, axis=1), 0.0)
