"""MoRA, later MoRAM: rank-1 experts that say themselves how active they are, a few for each task (arXiv 2506.21035).

    z_i = a_i drop(x),   s = z / ||z||_2,   S = the K largest of s (signed),   w = softmax_S(s / tau), else 0
    y = W x + sum_i w_i z_i b_i,   in use without the experts of s_i < delta, what is left as it is

No router leaves: expert i's key is a_i, its one row of A, so its relevance w_i and its activation z_i come from one
product, under the adapter's own dropout mask. w does not change with the size of x.

Under the regime `continual` the experts are a bank: `per_task` for each task in turn. Those of later tasks are closed
(no part of the norm, of S or of the softmax), those of earlier ones act and do not learn. Opening a task's experts is
no identity although b = 0: they take their part of norm, places and softmax from the old ones. E experts, K active.
"""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from molora_jax.core import lowrank, routing
from molora_jax.routers.base import Router


@dataclasses.dataclass(frozen=True)
class SelfActivated(Router):
    """`temperature` is tau, `prune` delta, -1 for none. `per_task=0`: no bank, all experts are open and learn.

    `score="linear"` is an ablation: s of a trained `W [E, D]` in place of the keys, one for all tasks; z stays.
    """

    share: Literal["site"] = "site"
    k: int = 8
    temperature: float = 0.03
    prune: float = 0.2
    per_task: int = 0
    score: Literal["keys", "linear"] = "keys"

    COLLAPSES: ClassVar[bool] = False  # a bank opens few experts a task
    LIMITS: ClassVar = {
        "k": (2, None), "temperature": (0, None, "()"), "prune": (-1.0, None), "per_task": (0, None),
    }  # fmt: skip
    REFUSES: ClassVar[tuple] = (
        (
            "adapter.name", (("adapter.name", "not in", ("lora", "rslora")),),
            "lora or rslora: an expert's key is its row of A, and a change that is more than b a has no such one",
            "Change the adapter, or the router.",
        ),
        (
            "adapter.rank", (("adapter.rank", "above", 1),),
            "1: an expert is one key and one value", "Raise experts in place of the rank.",
        ),
        (
            "sites", (("sites", "is", "ffn"),),
            "projections: one decision for a whole FFN would read three A", "Write gate,up,down.",
        ),
        (
            "placement.name", (("placement.name", "given", True),),
            "no placement by name: the router reads the A of a projection", "Leave placement out.",
        ),
    )  # fmt: skip

    def k_max(self, experts):
        return min(self.k, experts)

    def init_leaves(self, key, site, layer):
        return super().init_leaves(key, site, layer) if self.score == "linear" else {}

    def init_state(self, site):
        return {"tasks": jnp.ones((), jnp.int32)} if self.per_task else {}

    def room(self, experts):
        return experts // self.per_task if self.per_task else None

    def next_task(self, state):
        return {"tasks": state["tasks"] + 1} if self.per_task else state

    def learning(self, state, experts):
        if not self.per_task:
            return None
        return jnp.arange(experts) // self.per_task == state["tasks"] - 1

    def input_of(self, x, leaves, ctx):
        if self.score == "linear":
            return x
        flat = x.reshape(-1, x.shape[-1])
        seen = lowrank.dropped(flat, lowrank.dropout(ctx.keyed(), ctx.dropout), jnp.arange(len(flat)))
        return routing.logits(leaves["A"][:, 0], seen).reshape(*x.shape[:-1], -1)

    def route(self, p, shared, x, ctx):
        z = routing.logits(p["W"], x) if self.score == "linear" else x
        E = z.shape[-1]
        mask = jnp.ones(E, bool) & routing.permitted(ctx.allowed)
        if self.per_task:
            mask &= jnp.arange(E) < self.per_task * ctx.state["tasks"]
        z = jnp.where(mask, z, 0.0)
        s = normalised(z)
        selected = routing.top_k(jnp.where(mask, s, routing.NEG_INF), self.k_max(E)) & mask
        w = jax.nn.softmax(jnp.where(selected, s / self.temperature, routing.NEG_INF), axis=-1)
        if not ctx.train and self.prune > -1:
            selected &= s >= self.prune
        probs = jnp.where(mask, jax.nn.softmax(jnp.where(mask, s / self.temperature, routing.NEG_INF), axis=-1), 0.0)
        decision = routing.finish(jnp.where(selected, w, 0.0), selected, s, probs, ctx, k_max=self.k_max(E))
        return decision, ctx.carry, {}


def normalised(z):
    """`z [..., E]` over its Euclidean norm; 0 where that is 0 (there without a slope)."""
    square = jnp.sum(z * z, axis=-1, keepdims=True)
    there = square > jnp.finfo(jnp.float32).tiny
    return jnp.where(there, z / jnp.sqrt(jnp.where(there, square, 1.0)), 0.0)
