"""(IA)3 (Liu et al. 2022, arXiv 2205.05638): a trained vector scales what a projection gives, or what `down` is given.

    y = l_e * (W x + bias)    at every projection but down        l_e [D_out]
    y = W (l_e * x) + bias    at down                             l_e [D_in]

l starts at 1. The paper's sites are k, v and down. There is no product B A, so no rank, alpha or dropout (0: it has
none). A mixture scales by 1 + sum_e g_e (l_e - 1), of a whole feed-forward block each expert by its own l_e: E experts
share nothing. (Mixture of vectors, Zadouri et al. 2023, arXiv 2309.05444, is this with a router over all experts.)
"""

import dataclasses
from typing import ClassVar, Literal

import jax.numpy as jnp

from molora_jax.adapters.base import Adapter
from molora_jax.core.types import Factors


@dataclasses.dataclass(frozen=True)
class Ia3(Adapter):
    rank: int = 0
    alpha: float = 0.0
    dropout: float = 0.0
    init: Literal["kaiming"] = "kaiming"  # there is nothing to draw

    LIMITS: ClassVar = {"rank": (0, 0), "alpha": (0, 0), "dropout": (0, 0)}
    ROW_FACTORS: ClassVar[bool] = True
    AFTER_DOWN: ClassVar[bool] = False

    def scale(self):
        return 1.0

    def init_leaves(self, key, site, layer, *, base=None, base_grad=None):
        """`l [E, D_out]`; `[E, D_in]` at down."""
        return {"l": jnp.ones((site.experts, site.d_in if site.name == "down" else site.d_out))}

    def factors(self, p, shared, ctx):
        site, l = ctx.site, p["l"]  # noqa: E741
        empty = Factors(jnp.zeros((len(l), 0, site.d_in)), jnp.zeros((len(l), 0, site.d_out)))
        return empty.replace(inp=l) if site.name == "down" else empty.replace(out=l, with_bias=True)
