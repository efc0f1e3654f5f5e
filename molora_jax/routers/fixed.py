"""Routing that nothing trains: by a hash of the token, by the task, both, or at random.

    token       e = hash(token id) mod E                            Hash layers (Roller et al. 2021, arXiv 2106.04426)
    task        e = task mod E                                      DEMix (arXiv 2108.05036): an expert a domain
    task_token  a group of E / G experts by the task, inside by the token's hash     PanGu-Sigma (arXiv 2303.10845)
    none        g_e = 1 / E, all of them

The weight is 1. Where a batch names no tasks (a prompt), `task` mixes all experts alike, which is DEMix's uniform
prior, and `task_token` takes the hash over all E. `random` = 1: in training every token takes an expert drawn at
random instead; with `by="none"` that is THOR (arXiv 2110.04260) without its consistency loss. E experts, G `groups`.
"""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from molora_jax.core import routing
from molora_jax.errors import InputError
from molora_jax.routers.base import Router


def hashed(ids, seed):
    """uint32 `[...]` of int32 ids, whose low bits are mixed too (the finaliser of MurmurHash3)."""
    h = ids.astype(jnp.uint32) ^ jnp.uint32((seed * 0x9E3779B1) & 0xFFFFFFFF)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = (h ^ (h >> shift)) * jnp.uint32(factor)
    return h ^ (h >> 16)


@dataclasses.dataclass(frozen=True)
class Fixed(Router):
    """`seed` makes another hash; `random` is the probability of the draw, 0 outside training."""

    by: Literal["token", "task", "task_token", "none"] = "token"
    groups: int = 2
    seed: int = 0
    random: float = 0.0

    LIMITS: ClassVar = {"groups": (1, None), "seed": (0, None), "random": (0, 1)}
    RANDOM: ClassVar = ("random",)
    COLLAPSES: ClassVar[bool] = False

    def k_max(self, experts):
        return 1 if self.by in ("token", "task_token") else experts

    def init_leaves(self, key, site, layer):
        return {}

    def route(self, p, shared, x, ctx):
        E, shape = ctx.site.experts, x.shape[:-1]
        place, count = routing.places(ctx.allowed, E)
        count = jnp.broadcast_to(jnp.maximum(count, 1)[..., 0], shape)
        chosen, known = self._place(ctx, count)
        hot = place == chosen[..., None] if known else jnp.broadcast_to(place >= 0, (*shape, E))
        if self.random and ctx.train:
            draw = jax.random.uniform(ctx.keyed(5), shape)
            other = place == jnp.floor(jax.random.uniform(ctx.keyed(6), shape) * count).astype(jnp.int32)[..., None]
            hot = jnp.where((draw < self.random)[..., None], other, hot)
        gates = routing.normalised(hot.astype(jnp.float32))
        z = jnp.where(hot, 0.0, routing.NEG_INF)
        decision = routing.finish(gates, hot, z, gates, ctx, k_max=self.k_max(E), sums_to_one=True)
        return decision, ctx.carry, {}

    def _place(self, ctx, count):
        """`(the place of a token's expert among those permitted [B, S], True)`, or `(None, False)`: all of them."""
        if self.by == "none" or self.by == "task" and not ctx.tasked:
            return None, False
        if self.by == "task":
            return ctx.task_ids % count, True
        if ctx.tokens is None:
            raise InputError(
                "router.by", got=f"{self.by!r} in a module, which is given no token ids", expected="'task' or 'none'",
                fix="Hash routing needs the ids: use it in a run's config, or route by a trained router.",
            )  # fmt: skip
        token = hashed(ctx.tokens, self.seed)
        if self.by == "token" or not ctx.tasked:
            return (token % count.astype(jnp.uint32)).astype(jnp.int32), True
        G = jnp.minimum(self.groups, count)
        group = ctx.task_ids % G
        first, stop = -(-group * count // G), -(-(group + 1) * count // G)
        return first + (token % (stop - first).astype(jnp.uint32)).astype(jnp.int32), True
