"""Mathematics that routers share: float32 logits, selections, and the value that leaves a router.

Selections are comparisons, hence constants for autodiff; gradients reach a router through the gates.
"""

import functools

import chex
import jax
import jax.numpy as jnp

from molora_jax.core.types import Array, Context, Routing

NEG_INF = -1e30  # finite, so that a fully masked row gives a uniform softmax instead of NaN


# Everything that scores follow from: by default a GPU multiplies float32 in TF32 and a TPU in bfloat16.
exact = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def logits(W: Array, x: Array, b: Array | None = None) -> Array:
    """`x [..., D]`, `W [E, D]` -> `[..., E]`, in float32 whatever the compute dtype (bf16 flips near-ties)."""
    chex.assert_shape(W, (None, x.shape[-1]))
    z = exact("...d,ed->...e", x.astype(jnp.float32), W.astype(jnp.float32))
    return z if b is None else z + b


def permitted(allowed: Array | None) -> Array | bool:
    """`allowed [E] | [B, E] | [B, S, E] | None` as a mask that broadcasts against `[B, S, E]`."""
    return True if allowed is None else allowed[:, None, :] if allowed.ndim == 2 else allowed


def softmax(z: Array, allowed: Array | None = None) -> Array:
    """Softmax over the experts that are allowed (see `permitted`); the others get exactly 0."""
    if allowed is None:
        return jax.nn.softmax(z, axis=-1)
    mask = permitted(allowed)
    return jnp.where(mask, jax.nn.softmax(jnp.where(mask, z, NEG_INF), axis=-1), 0.0)


def top_k(score: Array, k: int) -> Array:
    """The k largest of the last axis as a mask; the lower index wins a tie.

    For the usual k of 1 to 4, k max reductions: `lax.top_k` sorts, which costs a quarter of a CPU step (measured).
    """
    E = score.shape[-1]
    if k >= E:
        return jnp.ones(score.shape, bool)
    score = jax.lax.stop_gradient(score)
    if k > 4:
        _, idx = jax.lax.top_k(score, k)
        return jnp.any(jax.nn.one_hot(idx, E, dtype=bool), axis=-2)
    selected = jnp.zeros(score.shape, bool)
    for _ in range(k):
        best = jnp.argmax(jnp.where(selected, -jnp.inf, score), axis=-1)
        selected |= best[..., None] == jnp.arange(E)
    return selected


def top_p(probs: Array, p: float, *, crossing: bool = True) -> Array:
    """The shortest prefix of experts, by falling probability, whose sum passes p: the crossing expert included.

    `crossing=False` leaves it out: those whose sum, their own probability included, is at most p; maybe none (DynMoLE).

    Expert i is kept when the probability *before* it (of those ahead of it in the order) is at most p, so at least one
    is kept, and p >= 1 keeps all whatever the rounding. Ties: the lower index is ahead.
    """
    probs = jax.lax.stop_gradient(probs)
    if p >= 1:
        return jnp.ones(probs.shape, bool)
    order = jnp.argsort(-probs, axis=-1, stable=True)
    ranked = jnp.take_along_axis(probs, order, axis=-1)
    mass = jnp.cumsum(ranked, axis=-1)
    if crossing:
        mass = mass - ranked
    rank = jnp.argsort(order, axis=-1, stable=True)
    return jnp.take_along_axis(mass <= p, rank, axis=-1)


def places(allowed: Array | None, E: int) -> tuple[Array, Array]:
    """Every permitted expert's place among those permitted, `[E] | [B, 1, E]`, and how many they are (last axis 1).

    An expert that is shut out has the place -1. What is said of "the e-th expert" is then the same as without it.
    """
    open_ = jnp.ones(E, bool) & permitted(allowed)
    return jnp.where(open_, jnp.cumsum(open_, axis=-1) - 1, -1), jnp.sum(open_, axis=-1, keepdims=True)


def in_groups(score: Array, groups: int, keep: int, k: int, *, by: str) -> Array:
    """Which experts lie in the `keep` best of `groups` equal runs of experts: a mask of `score [..., E]`.

    `by`, a group's score: "max" of its experts (DeepSeek-V2), "top2" the sum of its two best (V3), "share" the sum of
    its k / keep best (Megatron-LM). Experts that are shut out score `NEG_INF` and add nothing to a sum.
    """
    score = jax.lax.stop_gradient(score)
    E = score.shape[-1]
    ranked = -jnp.sort(-score.reshape(*score.shape[:-1], groups, E // groups), axis=-1)
    best = {"max": 1, "top2": 2, "share": max(k // keep, 1)}[by]
    ranked = ranked[..., :best]
    shut = ranked <= NEG_INF / 2
    total = jnp.where(jnp.all(shut, axis=-1), NEG_INF, jnp.sum(jnp.where(shut, 0.0, ranked), axis=-1))
    return jnp.repeat(top_k(total, keep), E // groups, axis=-1)


def finish(
    gates: Array,
    selected: Array,
    z: Array,
    probs: Array,
    ctx: Context,
    *,
    k_max: int,
    clipped: Array | None = None,
    base: Array | None = None,
    chosen: Array | None = None,
    averaged: Array | None = None,
    sums_to_one: bool = False,
) -> Routing:
    """Takes padding and shut-out experts out of a decision: at padding no expert, no gate, the base alone.

    `sums_to_one`: the router vouches that a token's gates sum to 1 (up to rounding) where it has any expert at all; it
    then gives no `base` of its own, the frozen FFN's coefficient (`Routing.base_gate`).
    """
    B, S = ctx.valid.shape
    chex.assert_shape([gates, selected, z, probs], (B, S, None))
    chex.assert_equal_shape([gates, selected, z, probs])
    assert base is None or not sums_to_one, "gates that sum to one leave the base nothing"
    selected = selected & ctx.valid[..., None] & permitted(ctx.allowed)
    gates = jnp.where(selected, gates, 0.0)
    if sums_to_one:
        base = ~jnp.any(selected, axis=-1)
    elif base is not None:
        base = jnp.where(ctx.valid, base, jnp.ones((), base.dtype))
    if chosen is not None:
        chosen = chosen & selected
    return Routing(gates, selected, z, probs, ctx.valid, clipped, base, k_max, chosen, averaged=averaged)


def normalised(h: Array) -> Array:
    """`h [..., E]` over its sum; 0 where all experts are shut out."""
    total = jnp.sum(h, axis=-1, keepdims=True)
    return h / jnp.where(total == 0, 1.0, total)


def counts(routing: Routing) -> Array:
    """`[E]` float32: the tokens that chose each expert, of which a load bias follows."""
    return jnp.sum(routing.selected, axis=(0, 1), dtype=jnp.float32)


def with_load(bias: Array, count: Array, rate: float) -> Array:
    """A load bias `[E]` after a step: up by `rate` where fewer than the mean chose, else down (arXiv 2408.15664)."""
    return bias + rate * jnp.sign(jnp.mean(count) - count)


def of_task(ctx: Context, experts: int) -> Array:
    """`[B, S, E]` bool: expert `task_id mod E` of each token."""
    return (ctx.task_ids % experts)[..., None] == jnp.arange(experts)


def by_task(ctx: Context, experts: int) -> Routing:
    """Hard routing by the batch's task ids: the expert of the task alone, with weight 1."""
    hot = of_task(ctx, experts)
    p = hot.astype(jnp.float32)
    return finish(p, hot, jnp.where(hot, 0.0, NEG_INF), p, ctx, k_max=1, sums_to_one=True)


def settled(ctx: Context, k_max: int) -> Routing:
    """The gates that a prompt has decided, `ctx.settled [B, E]`, for every token of its answer."""
    gates = jnp.broadcast_to(ctx.settled[:, None], (*ctx.valid.shape, ctx.settled.shape[-1]))
    return finish(gates, gates != 0, gates, gates, ctx, k_max=k_max)


def slots(routing: Routing) -> tuple[Array, Array]:
    """`(idx [T, K] int32 padded with E, gates [T, K] float32)`, experts in rising order.

    Picks by `selected`, never by the gates' size: they may be negative, or 0 at a selected expert.
    """
    E, K = routing.gates.shape[-1], routing.k_max
    gates = routing.gates.reshape(-1, E)
    if K == E:
        selected = routing.selected.reshape(-1, E)
        return jnp.where(selected, jnp.arange(E, dtype=jnp.int32), E), gates
    selected = routing.selected.reshape(-1, E)
    slot = jnp.where(selected, jnp.cumsum(selected, axis=-1) - 1, -1)  # [T, E]
    hit = slot[:, None, :] == jnp.arange(K)[:, None]  # [T, K, E]
    idx = jnp.where(hit.any(-1), jnp.argmax(hit, axis=-1), E).astype(jnp.int32)
    return idx, jnp.sum(jnp.where(hit, gates[:, None, :], 0.0), axis=-1)


def sums(routing: Routing) -> dict[str, Array]:
    """Global sums from which statistics of expert load follow; padding excluded.

    `tokens`, `slots`, `entropy`, `clipped` scalars; `count`, `top1`, `prob [E]`.
    """
    valid = routing.valid[..., None]
    probs = jnp.where(valid, routing.probs, 0.0)
    selected = routing.selected & valid
    E = probs.shape[-1]
    # the strongest of the selected experts; a router without probabilities still has gates
    best = jnp.argmax(jnp.where(selected, jnp.abs(routing.gates), -1.0), axis=-1)
    top1 = (best[..., None] == jnp.arange(E)) & selected
    axes = tuple(range(selected.ndim - 1))
    total = {
        "tokens": jnp.sum(routing.valid, dtype=jnp.float32),
        "slots": jnp.sum(selected, dtype=jnp.float32),
        "entropy": -jnp.sum(jnp.where(probs > 0, probs * jnp.log(jnp.where(probs > 0, probs, 1.0)), 0.0)),
        "count": jnp.sum(selected, axis=axes, dtype=jnp.float32),
        "top1": jnp.sum(top1, axis=axes, dtype=jnp.float32),
        "prob": jnp.sum(probs, axis=axes),
        "clipped": jnp.float32(0)
        if routing.clipped is None
        else jnp.sum(jnp.where(routing.valid, routing.clipped, 0), dtype=jnp.float32),
    }
    return jax.lax.stop_gradient(total)


def expert_load(total: dict[str, Array]) -> dict[str, Array]:
    """Statistics of expert load from `sums` (any leading axes): the metrics of the contract.

    `load_max_over_mean` (1 is balanced, E is collapse), `entropy` (of the probabilities, nats a token), `top1_share`
    (largest fraction of tokens whose strongest expert is the same), `active_experts` (a token), `clipped_share`;
    `dropped_share` of the slots that an engine with a capacity was asked to send.
    """
    tokens = jnp.maximum(total["tokens"], 1.0)
    slots_ = jnp.maximum(total["slots"], 1.0)
    E = total["count"].shape[-1]
    out = {
        "load_max_over_mean": jnp.max(total["count"], axis=-1) * E / slots_,
        "entropy": total["entropy"] / tokens,
        "top1_share": jnp.max(total["top1"], axis=-1) / tokens,
        "active_experts": total["slots"] / tokens,
        "clipped_share": total["clipped"] / jnp.maximum(total["slots"] + total["clipped"], 1.0),
    }
    if "dropped" in total:
        out["dropped_share"] = total["dropped"] / jnp.maximum(total["sent"], 1.0)
    return out
