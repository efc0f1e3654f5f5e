"""Balance losses of the Switch family (Fedus et al. 2021, arXiv 2101.03961, eq. 4), with the published variants.

    l = E^(times_experts) * sum_e f_e P_e,    f_e = count_e / (slots | tokens),    P_e = mean probability of e

f carries no gradient with `counts="hard"` (choices); `"soft"` takes the gates, with gradient (DynMoLE).
`normalise="slots"`: f sums to 1, l is 1 at uniform routing; `"tokens"`: f sums to K, l is K there (MixLoRA).

`over` pools the sums before the product: `site` (one value a router), `layer` (joins the routers of a layer, MoLA),
`all` (joins all layers too: MixLoRA and HF Mixtral; opposite collapse in two layers then cancels). `reduce` is over the
remaining values. `per_example` forms one value an example (`[rows, segment id]`, padding excluded) and averages them.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from molora_jax.losses.base import Loss, leaves


@dataclasses.dataclass(frozen=True)
class Balance(Loss):
    over: Literal["site", "layer", "all"] = "site"
    reduce: Literal["sum", "mean"] = "mean"
    times_experts: bool = True
    per_example: bool = False
    normalise: Literal["slots", "tokens"] = "slots"
    counts: Literal["hard", "soft"] = "hard"

    def stats(self, routing, ctx):
        valid = routing.valid[..., None]
        picked = routing.selected if routing.chosen is None else routing.chosen
        chosen = routing.gates if self.counts == "soft" else picked
        count = jnp.where(valid, chosen.astype(jnp.float32), 0.0)
        prob = jnp.where(valid, routing.probs if routing.averaged is None else routing.averaged, 0.0)
        tokens = routing.valid.astype(jnp.float32)
        slots = jnp.sum(picked & valid, axis=-1).astype(jnp.float32)
        E = routing.probs.shape[-1]
        experts = E if ctx.allowed is None else jnp.sum(ctx.allowed, axis=-1, keepdims=ctx.allowed.ndim > 1)
        width = tokens * experts  # shut-out and padded experts do not count
        if self.counts == "hard":
            count = jax.lax.stop_gradient(count)
        if self.per_example:  # [B, N, ...] by segment id, whatever the row holds
            hot = jax.nn.one_hot(ctx.segment_ids - 1, ctx.max_segments)  # padding (-1) is all zero
            total = {"count": count, "prob": prob}
            total = {name: jnp.einsum("bsn,bse->bne", hot, value) for name, value in total.items()}
            return total | {
                "tokens": jnp.einsum("bsn,bs->bn", hot, tokens),
                "slots": jnp.einsum("bsn,bs->bn", hot, slots),
                "width": jnp.einsum("bsn,bs->bn", hot, width),
            }
        axes = (0, 1)
        return {
            "count": jnp.sum(count, axes),
            "prob": jnp.sum(prob, axes),
            "tokens": jnp.sum(tokens),
            "slots": jnp.sum(slots),
            "width": jnp.sum(width),
        }

    def join(self, stacked):
        return self.side_by_side(stacked) if self.per_example else super().join(stacked)

    def value(self, stats):
        values = [self._product(sums) for sums in self._pool(stats)]
        values = jnp.concatenate([v.reshape(-1) for v in values])
        return jnp.sum(values) if self.reduce == "sum" else jnp.mean(values)

    def _pool(self, stats):
        """Sums joined as `over` says; each entry leads with the layers that stay separate."""
        pools = {}
        for rule, segment, scope, sums in leaves(stats):
            E = sums["count"].shape[-1]
            if self.over == "all":  # layers with other expert counts cannot share an f
                sums = jax.tree.map(lambda x: jnp.sum(x, axis=0, keepdims=True), sums)
                key = E
            elif self.over == "layer":
                key = (segment, E)
            else:
                key = (rule, segment, scope)
            pools[key] = sums if key not in pools else jax.tree.map(jnp.add, pools[key], sums)
        return pools.values()

    def _product(self, sums):
        tokens = jnp.maximum(sums["tokens"], 1.0)
        whole = sums["slots" if self.normalise == "slots" else "tokens"]
        f = sums["count"] / jnp.maximum(whole, 1.0)[..., None]
        P = sums["prob"] / tokens[..., None]
        value = jnp.sum(f * P, axis=-1) * (sums["width"] / tokens if self.times_experts else 1)
        if not self.per_example:
            return value
        present = sums["tokens"] > 0
        return jnp.sum(jnp.where(present, value, 0.0), axis=(-2, -1)) / jnp.maximum(jnp.sum(present, axis=(-2, -1)), 1)
