"""X-LoRA (Buehler & Buehler 2024, arXiv 2402.07148): a head on the frozen base's last hidden state mixes LoRA experts.

    h = base(tokens), experts off, no gradient;   u = trunk(h);   z_l = W_l u + b_l;   g_l = gain softmax(z_l / T)

One head for the whole model, one slice W_l [E, D] of its last layer for each linear l that has experts: with
`share="site"` the slice lies with its layer and projection (the paper's layer-wise scalings), with `attn` or `ffn` the
projections of a sub-block share one, with `model` there is one for all (layer-wise scalings off). `depth` d > 1 puts
d - 1 layers (linear, ReLU, dropout; `width` H) in front, computed once a pass.

`mix`: `softmax` over all experts; `raw`, the logits themselves, without T; `softmax_topk`, softmax over the kept ones.
`top_k` > 0 keeps the k largest and does not renormalise (with `softmax_topk` it does, per token: the original code
took one softmax over the kept entries of the whole batch, by which examples changed each other; peft's form is kept
here). Experts see the gates as they are, so at the start, near 1 / E, the model is the average adapter.

E experts, D width, H hidden width of the head. Experts come from other runs (rules.X.load) or from a stage before.
"""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from molora_jax.core import routing
from molora_jax.routers.base import Router


def linear(key, d_out: int, d_in: int, bias: bool) -> dict:
    """torch's default start: W and b ~ U(+-1 / sqrt(D_in))."""
    bound, keys = d_in**-0.5, jax.random.split(key)
    leaves = {"W": jax.random.uniform(keys[0], (d_out, d_in), minval=-bound, maxval=bound)}
    return leaves | ({"b": jax.random.uniform(keys[1], (d_out,), minval=-bound, maxval=bound)} if bias else {})


@dataclasses.dataclass(frozen=True)
class XLora(Router):
    init: Literal["kaiming"] = "kaiming"
    temperature: float = 1.0
    mix: Literal["softmax", "raw", "softmax_topk"] = "softmax"
    top_k: int = 0  # 0: all
    depth: int = 1
    width: int = 2048
    dropout: float = 0.2  # between the head's layers
    bias: bool = True
    gain: float = 1.0

    INPUT: ClassVar[str] = "base_hidden"
    LIMITS: ClassVar = {
        "temperature": (0, None, "()"), "top_k": (0, None), "depth": (1, None), "width": (1, None),
        "dropout": (0, 1, "[)"),
    }  # fmt: skip

    def k_max(self, experts):
        return min(self.top_k or experts, experts)

    def init_leaves(self, key, site, layer):
        return linear(key, site.experts, self.width if self.depth > 1 else site.d_in, self.bias)

    def init_shared(self, key, sites):
        if self.depth == 1:
            return {}
        widths = (sites[0].d_in, *[self.width] * (self.depth - 1))
        return {
            "trunk": {
                str(i): linear(jax.random.fold_in(key, i), d_out, d_in, True)
                for i, (d_in, d_out) in enumerate(zip(widths[:-1], widths[1:], strict=True))
            }
        }

    def base_features(self, shared, h, ctx):
        for i in range(self.depth - 1):
            p = shared["trunk"][str(i)]
            h = jax.nn.relu(routing.logits(p["W"], h, p["b"]))
            if ctx.key is not None and self.dropout:
                keep = jax.random.bernoulli(ctx.keyed(i), 1 - self.dropout, h.shape)
                h = jnp.where(keep, h / (1 - self.dropout), 0.0)
        return h

    def route(self, p, shared, x, ctx):
        z = routing.logits(p["W"], x, p.get("b"))
        cool, allowed = z / self.temperature, routing.permitted(ctx.allowed)
        probs = routing.softmax(cool, ctx.allowed)
        k = self.k_max(z.shape[-1])
        selected = routing.top_k(jnp.where(allowed, z, routing.NEG_INF), k)  # logits: cold probabilities tie at 0
        if self.mix == "softmax_topk":
            gates = jax.nn.softmax(jnp.where(selected & allowed, cool, routing.NEG_INF), axis=-1)
        else:
            gates = probs if self.mix == "softmax" else z
        whole = self.gain == 1 and (self.mix == "softmax_topk" or self.mix == "softmax" and k == z.shape[-1])
        decision = routing.finish(self.gain * gates, selected, z, probs, ctx, k_max=k, sums_to_one=whole)
        return decision, ctx.carry, {}
