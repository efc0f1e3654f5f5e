"""CoMoL's router (2026, arXiv 2603.00573): it reads the R numbers that the adapter makes of a token.

    z = A drop(x),   g = softmax(V z)             A [1, R, D_in] the site's, one for all experts;   V [E, R] (leaf W)

Inputs of equal A x get equal gates, and a router has E R parameters in place of E D_in. The dropout is the adapter's
own mask. Its ablation, a softmax of the undropped x, is `softmax_topk` with k=0.
B batch, S sequence, E experts, R rank.
"""

import dataclasses
from typing import ClassVar, Literal

import jax.numpy as jnp

from molora_jax.core import lowrank
from molora_jax.core.routing import exact
from molora_jax.routers.softmax_topk import SoftmaxTopK


@dataclasses.dataclass(frozen=True)
class CoreSpace(SoftmaxTopK):
    """`k=0`, the method's, mixes all experts."""

    k: int = 0
    init: Literal["normal", "kaiming"] = "kaiming"

    IN_RANK: ClassVar[bool] = True
    REFUSES: ClassVar[tuple] = (
        (
            "adapter.name", (("adapter.name", "not in", ("comol", "lora_shared_a")),),
            "comol or lora_shared_a: the router reads A x, and experts with an A each have no such one",
            "Change the adapter, or route by softmax_topk.",
        ),
        (
            "router.share", (("router.share", "not in", ("site",)),),
            "'site': each projection has an A of its own", "Leave share out.",
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

    def input_of(self, x, leaves, ctx):
        flat = x.reshape(-1, x.shape[-1])
        seen = lowrank.dropped(flat, lowrank.dropout(ctx.keyed(), ctx.dropout), jnp.arange(len(flat)))
        z = exact("td,rd->tr", seen.astype(jnp.float32), leaves["A"][0].astype(jnp.float32))
        return z.reshape(*x.shape[:-1], -1)
