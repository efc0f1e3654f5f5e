"""DynMoLE: all experts for a token of uncertain routing, top-p with a floor of k for the others (arXiv 2504.00661).

    p = softmax(W x),  H = S_q(p) / max S_q                                 (Tsallis entropy, `core/entropy.py`)
    H > threshold: all E experts;   else the i with c_i <= P or rank_i < k   (c_i: sum of p down to and with i)
    g_i = p_i for these, else 0:  never renormalised

The expert that crosses P is not kept unless it is among the first k (in `top_p` it is). The decision is a token's own;
the selection is a constant for autodiff, so gradients come through p in g and through the losses.
B batch, S sequence, E experts.
"""

import dataclasses
from typing import ClassVar, Literal

import jax.numpy as jnp

from molora_jax.core import entropy, routing
from molora_jax.routers.base import Router


@dataclasses.dataclass(frozen=True)
class EntropyHybrid(Router):
    """`threshold >= 1` turns the soft branch off. Entropy and softmax are float32: comparisons near P flip in bf16."""

    k: int = 2
    p: float = 0.75
    threshold: float = 0.9
    kind: Literal["tsallis", "renyi"] = "tsallis"
    q: float = 1.1
    eps: float = 1e-5

    LIMITS: ClassVar = {
        "k": (1, None), "p": (0, None, "()"), "q": (0.01, 2.0), "eps": (0.0, 1.0), "threshold": (0.0, None),
    }  # fmt: skip

    def k_max(self, experts):
        return experts if self.threshold < 1 else min(max(self.k, self.most_by_mass(experts)), experts)

    def most_by_mass(self, experts):
        """Experts that top-p alone can keep: uniform p keeps the most, as many as fit into P (one more by rounding)."""
        return int(self.p * experts) + 1

    def route(self, p, shared, x, ctx):
        z = routing.logits(p["W"], x)
        probs = routing.softmax(z, ctx.allowed)
        selected = routing.top_p(probs, self.p, crossing=False) | routing.top_k(probs, self.k)
        if self.threshold < 1:
            H = entropy.normalised(probs, kind=self.kind, q=self.q, eps=self.eps, allowed=ctx.allowed)
            selected |= (H > self.threshold)[..., None]
        gates = jnp.where(selected, probs, 0.0)
        return routing.finish(gates, selected, z, probs, ctx, k_max=self.k_max(z.shape[-1])), ctx.carry, {}
