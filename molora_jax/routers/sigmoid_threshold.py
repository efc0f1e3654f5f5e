"""A weight of its own for each expert, and a threshold that shuts some out (MoA, arXiv 2506.05928).

    w = sigmoid(f(x)),   f(x) = W x + b,   or   W2 (silu(W1 x + b1) * (W3 x + b3)) + b2 of hidden width H = 4 E
    soft:     g = w
    sparse:   tau = tau_max sigmoid(w_tau x + b_tau),   g_e = w_e where w_e >= tau, else 0

Nothing is normalised: g_e follows from its own logit alone, tokens may have all experts or none. At the start w is near
1/2 and tau near tau_max / 2, so that all are active: sparsity comes as the router learns to close.

In `sparse_weight="masked"`, the paper's code, the threshold stands in a comparison alone: w_tau and b_tau get no
gradient and keep their start. "shifted" gives g_e = w_e - tau, which trains them.

`pool="instance"`: one decision an example, on the mean of x over its tokens. It sees tokens before they are predicted,
so a training loss is not that of a causal model; in decoding the prompt alone decides, for the whole answer.
B batch, S sequence, D width, E experts.
"""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from molora_jax.core import routing
from molora_jax.core.types import Array, Context
from molora_jax.routers.base import Router


@dataclasses.dataclass(frozen=True)
class SigmoidThreshold(Router):
    """`expand`: hidden width of f over E. `tau_max` and what follows matter for `mode="sparse"`: `threshold` says
    whether tau is each token's own or the bias alone ("constant")."""

    init: Literal["normal", "kaiming"] = "kaiming"
    f: Literal["swiglu", "linear"] = "swiglu"
    expand: int = 4
    mode: Literal["soft", "sparse"] = "soft"
    tau_max: float = 0.5
    threshold: Literal["token", "constant"] = "token"
    sparse_weight: Literal["masked", "shifted"] = "masked"
    pool: Literal["token", "instance"] = "token"

    LIMITS: ClassVar = {"expand": (1, None), "tau_max": (0, 1)}

    @property
    def SETTLES(self):
        return self.pool == "instance"

    def k_max(self, experts):
        return experts

    def init_leaves(self, key, site, layer):
        E, D = site.experts, site.d_in
        H, keys = self.expand * E, jax.random.split(key, 6)

        def draw(key, *shape, fan=D):
            if self.init == "normal":
                return 0.02 * jax.random.normal(key, shape)
            return jax.random.uniform(key, shape, minval=-(fan**-0.5), maxval=fan**-0.5)

        if self.f == "linear":
            out = {"W": draw(keys[0], E, D), "b": draw(keys[1], E)}
        else:
            out = {"W1": draw(keys[0], H, D), "W3": draw(keys[1], H, D), "W2": draw(keys[2], E, H, fan=H)}
            out |= {"b1": jnp.zeros(H), "b3": jnp.zeros(H), "b2": jnp.zeros(E)}
        if self.mode == "sparse":
            out |= {"w_tau": draw(keys[3], 1, D)} if self.threshold == "token" else {}
            out["b_tau"] = draw(keys[4], 1)
        return out

    def route(self, p, shared, x, ctx):
        x = pooled(x, ctx) if self.pool == "instance" else x
        if self.f == "linear":
            z = routing.logits(p["W"], x, p["b"])
        else:
            hidden = jax.nn.silu(routing.logits(p["W1"], x, p["b1"])) * routing.logits(p["W3"], x, p["b3"])
            z = routing.logits(p["W2"], hidden, p["b2"])
        w = gates = jax.nn.sigmoid(z)
        selected = jnp.ones(w.shape, bool)
        if self.mode == "sparse":
            raw = routing.logits(p["w_tau"], x, p["b_tau"]) if self.threshold == "token" else p["b_tau"]
            tau = self.tau_max * jax.nn.sigmoid(raw)
            selected = w >= tau
            gates = w - tau if self.sparse_weight == "shifted" else w
        return routing.finish(gates, selected, z, w, ctx, k_max=self.k_max(z.shape[-1])), ctx.carry, {}


def pooled(x: Array, ctx: Context) -> Array:
    """Mean of `x [B, S, D]` over the tokens of each token's example, float32; 0 at padding."""
    numbers = jnp.arange(1, ctx.max_segments + 1)
    own = (ctx.segment_ids[:, None, :] == numbers[:, None]).astype(jnp.float32)  # [B, N, S]
    total = routing.exact("bns,bsd->bnd", own, x.astype(jnp.float32))
    mean = total / jnp.maximum(jnp.sum(own, axis=-1, keepdims=True), 1)
    place = jnp.clip(ctx.segment_ids - 1, 0)[..., None]
    return jnp.where(ctx.valid[..., None], jnp.take_along_axis(mean, place, axis=1), 0.0)
