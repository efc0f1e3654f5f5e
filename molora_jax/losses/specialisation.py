"""LoRA-Mixer's routing-specialisation loss: experts used alike, tokens that know theirs (arXiv 2507.00029).

    l = sum_i pbar_i fbar_i  +  sign lam E_x[H(p(x))],     H(p) = -sum_i p_i log p_i

pbar_i: mean over tokens of p_i; fbar_i: the part of the tokens (`assigned="samples"`: of the examples) whose likeliest
expert is i, which carries no gradient; `"soft"` takes pbar itself, sum_i pbar_i^2 (the appendix). The paper's balance
coefficient is `weight`, over all of it; its lambda is weight * lam.

The printed sign is -1: it rewards uncertain tokens, up to H = log E. The text asks for sharp, task-aligned routing,
which is +1. At uniform p the first term is 1/E. One value a router, their mean; padding does not count. E experts.
"""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from molora_jax.losses.base import Loss, leaves


@dataclasses.dataclass(frozen=True)
class Specialisation(Loss):
    weight: float = 1e-2
    lam: float = 0.1
    entropy_sign: Literal[1, -1] = 1
    assigned: Literal["tokens", "samples", "soft"] = "tokens"

    LIMITS: ClassVar = {"lam": (0, None)}

    def stats(self, routing, ctx):
        """`count, prob [E]`; `entropy`, `tokens`, `assigned` (what `count` sums to) scalars."""
        valid, p = routing.valid[..., None], routing.probs
        each = jnp.where(valid, p, 0.0)
        if self.assigned == "samples":
            hot = jax.nn.one_hot(ctx.segment_ids - 1, ctx.max_segments) * valid  # [B, S, N], padding all zero
            score, there = jnp.einsum("bsn,bse->bne", hot, each), jnp.any(hot > 0, axis=1)
        else:
            score, there = each, routing.valid
        best = jnp.argmax(score, axis=-1)[..., None] == jnp.arange(p.shape[-1])
        count = jnp.sum(best & there[..., None], axis=(0, 1), dtype=jnp.float32)
        h = -jnp.sum(jnp.where(each > 0, each * jnp.log(jnp.where(each > 0, each, 1.0)), 0.0))
        return {
            "count": jax.lax.stop_gradient(count), "assigned": jnp.sum(there, dtype=jnp.float32),
            "prob": jnp.sum(each, axis=(0, 1)), "entropy": h, "tokens": jnp.sum(valid, dtype=jnp.float32),
        }  # fmt: skip

    def value(self, stats):
        return jnp.mean(jnp.concatenate([self._each(sums) for *_, sums in leaves(stats)]))

    def _each(self, sums):
        """`[L]`, of sums that lead with the layers."""
        tokens = jnp.maximum(sums["tokens"], 1.0)
        pbar = sums["prob"] / tokens[..., None]
        fbar = pbar if self.assigned == "soft" else sums["count"] / jnp.maximum(sums["assigned"], 1.0)[..., None]
        return jnp.sum(pbar * fbar, axis=-1) + self.entropy_sign * self.lam * sums["entropy"] / tokens
