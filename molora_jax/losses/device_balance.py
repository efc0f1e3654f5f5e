"""DeepSeekMoE's device-level balance: the load of groups of experts, not of each one (arXiv 2401.06066, eq. 15 to 17).

    l = sum_g f'_g P'_g,    f'_g = mean of f_j over the experts j of group g,    P'_g = sum of P_j over them
    f_j = count_j E / slots,    P_j = mean probability of j

1 where all groups are used alike, whatever happens inside them; groups of one expert give the balance loss of experts,
one group the constant 1. f carries no gradient.

`counts="devices"` is DeepSeek-V2's communication balance (arXiv 2405.04434): f'_g = D / (M T) times the tokens that are
sent to group g at all, once each, M the most groups of a token (`limit`), so that devices receive alike.

Group g holds the g-th run of ceil(E / groups) experts, which are those of one device where tokens travel to experts
over `groups` devices; the loss itself does not depend on a mesh.
Experts that are shut out or not there count in neither E nor a group's size. E experts.
"""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from molora_jax.losses.base import Loss, leaves


@dataclasses.dataclass(frozen=True)
class DeviceBalance(Loss):
    """`reduce` is over routers (the paper adds up the layers'). `limit` is M, of `counts="devices"`: the router's
    `keep_groups`; 0 takes the mean number of groups of a token in the batch.
    """

    weight: float = 0.05
    groups: int = 4
    reduce: Literal["sum", "mean"] = "sum"
    counts: Literal["experts", "devices"] = "experts"
    limit: int = 0

    LIMITS: ClassVar = {"groups": (1, None), "limit": (0, None)}

    def stats(self, routing, ctx):
        """`count, prob, open [E]`, the last the tokens that may choose an expert; `tokens`, `slots` scalars; `sent [G]`
        the tokens of each group."""
        valid = routing.valid[..., None]
        chosen = (routing.selected if routing.chosen is None else routing.chosen) & valid
        allowed = True if ctx.allowed is None else ctx.allowed if ctx.allowed.ndim == 1 else ctx.allowed[:, None]
        total = {"count": chosen, "prob": jnp.where(valid, routing.probs, 0.0), "open": valid & allowed}
        total["open"] = jnp.broadcast_to(total["open"], chosen.shape)
        total = {name: jnp.sum(value, axis=(0, 1), dtype=jnp.float32) for name, value in total.items()}
        total |= {"tokens": jnp.sum(routing.valid, dtype=jnp.float32), "slots": jnp.sum(chosen, dtype=jnp.float32)}
        sent = jnp.any(chosen[..., None] & self._hot(chosen.shape[-1]), axis=-2)
        total["sent"] = jnp.sum(sent, axis=(0, 1), dtype=jnp.float32)
        return total | {name: jax.lax.stop_gradient(total[name]) for name in ("count", "slots", "sent")}

    def _hot(self, E):
        """`[E, G]` bool: the group of each expert."""
        return (jnp.arange(E) // -(-E // self.groups))[:, None] == jnp.arange(self.groups)

    def value(self, stats):
        values = jnp.concatenate([self._product(sums) for *_, sums in leaves(stats)])
        return jnp.sum(values) if self.reduce == "sum" else jnp.mean(values)

    def _product(self, sums):
        """`[L]`, of sums that lead with the layers."""
        E = sums["count"].shape[-1]
        hot = self._hot(E).astype(jnp.float32)
        each = {name: sums[name] @ hot for name in ("count", "prob", "open")}
        tokens, slots = (jnp.maximum(sums[name], 1.0)[..., None] for name in ("tokens", "slots"))
        if self.counts == "devices":
            most = self.limit or jnp.maximum(jnp.sum(sums["sent"], axis=-1, keepdims=True) / tokens, 1e-30)
            used = jnp.sum(each["open"] > 0, axis=-1, keepdims=True)
            return jnp.sum(used / (most * tokens) * sums["sent"] * each["prob"] / tokens, axis=-1)
        # f' = (count_g E / slots) / size_g, with E and size_g as sums over tokens, whose number cancels
        size = jnp.where(each["open"] > 0, each["open"], 1.0)
        f = each["count"] * jnp.sum(sums["open"], axis=-1, keepdims=True) / slots / size
        return jnp.sum(f * each["prob"] / tokens, axis=-1)
