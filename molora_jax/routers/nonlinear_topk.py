"""Softmax top-K over logits that are no product W x: a cosine, an MLP, or an attention over the experts.

    cosine     z_e = cos(V x, w_e) / tau        V [H, D], w_e [H]; tau = max(exp(log_tau), 0.01) is trained
    mlp        z = W relu(V x + b) + c          V [H, D], W [E, H]
    attention  z = softmax(q k^T) v,  q = W x, k = V x, v = U x in R^E: a row of E weights for each expert

`cosine` is X-MoE's (Chi et al. 2022, arXiv 2204.09179): by length alone no expert can win, which keeps representations
from collapsing onto the experts' vectors. `attention` is Yuan 2.0-M32's (arXiv 2405.17976): an expert's logit sees how
the others stand. After them all is `softmax_topk`. D width, E experts, H `hidden`.
"""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from molora_jax.core import routing
from molora_jax.routers.softmax_topk import SoftmaxTopK


def unit(v):
    """`v [..., H]` over its length; 0, with a finite slope, where it has none."""
    return v * jax.lax.rsqrt(jnp.sum(v * v, axis=-1, keepdims=True) + 1e-12)


@dataclasses.dataclass(frozen=True)
class NonlinearTopK(SoftmaxTopK):
    """`hidden` is of cosine and mlp (X-MoE takes E / 2 and an unpublished default), `tau` the start of the cosine's."""

    form: Literal["cosine", "mlp", "attention"] = "cosine"
    hidden: int = 16
    tau: float = 0.07

    LIMITS: ClassVar = {"hidden": (1, None), "tau": (0.01, None)}

    def init_leaves(self, key, site, layer):
        keys = jax.random.split(key, 3)
        own = super().init_leaves
        if self.form == "attention":
            return {name: own(k, site, layer)["W"] for name, k in zip(("W", "V", "U"), keys, strict=True)}
        narrow = dataclasses.replace(site, d_in=self.hidden)
        V = own(keys[1], dataclasses.replace(site, experts=self.hidden), layer)["W"]
        leaves = {"W": own(keys[0], narrow, layer)["W"], "V": V}
        if self.form == "mlp":
            return leaves | {"b": jnp.zeros(self.hidden), "c": jnp.zeros(site.experts)}
        return leaves | {"log_tau": jnp.log(jnp.full((), self.tau))}

    def logits(self, p, x, ctx):
        if self.form == "attention":
            q, k, v = (routing.logits(p[name], x) for name in ("W", "V", "U"))
            open_ = jnp.broadcast_to(routing.permitted(ctx.allowed), k.shape)[..., None, :]
            rows = jax.nn.softmax(jnp.where(open_, q[..., :, None] * k[..., None, :], routing.NEG_INF), axis=-1)
            return jnp.sum(rows * v[..., None, :], axis=-1)
        h = routing.logits(p["V"], x, p.get("b"))
        if self.form == "mlp":
            return routing.logits(p["W"], jax.nn.relu(h), p["c"])
        return routing.logits(unit(p["W"]), unit(h)) / jnp.maximum(jnp.exp(p["log_tau"]), 0.01)
