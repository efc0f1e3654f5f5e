"""The stack as a function: one `lax.scan` a segment over `block.apply`, inside `jax.checkpoint`.

Base parameters stay stacked `[L, ...]` and are indexed inside the body (slicing the stack into segments outside would
copy it). `remat` picks what the backward keeps: `none` all activations, `dots` the matrix products (those by experts
too), `full` nothing; a layer's base weights are never kept: a sharded base is gathered a layer at a time, twice.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kernels_pallas.tiles import PRODUCT
from molora_jax.backbones.decoder import Block, rotary
from molora_jax.backbones.layer import Layer
from molora_jax.core.types import Context

_policies = jax.checkpoint_policies


def _activations(prim, *avals, **params) -> bool:
    """Everything but a layer's base weights, neither under their name nor as the slice that the name is given to."""
    sliced = prim.name in ("dynamic_slice", "squeeze") or (prim.name == "name" and params["name"] == "base")
    return not sliced


REMAT = {
    "none": _activations,
    "dots": _policies.save_from_both_policies(
        _policies.dots_with_no_batch_dims_saveable, _policies.save_only_these_names(PRODUCT)
    ),
    "full": _policies.nothing_saveable,
}


def attention_mask(segment_ids):
    """Causal and block-diagonal by example: `[B, S]` -> `[B, 1, S, S]`; padding sees padding (no empty row)."""
    S = segment_ids.shape[1]
    same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    return same & jnp.tril(jnp.ones((S, S), bool))


def window_mask(mask, at, window: int):
    """What a sliding layer sees of `mask [B, 1, S, S_k]`: keys less than `window` behind the slots `at [B | 1, S]`."""
    behind = at[:, None, :, None] - jnp.arange(mask.shape[-1])
    return mask & (behind < window)


def run(model, params, adapters, state, x, ctx: Context, *, mask, carry, given, cache=None, collect=False, constrain):
    """Runs all layers. `x [B, S, D]`, `params` the stacked blocks, `adapters[rule][segment]`, `state` likewise.

    `carry` by rule goes through the layers; `cache` is `(k, v, write)` with `k, v [L, B, S_k, H_kv, H_d]` and
    `write(buffer [B, ...], new [B, S, ...])`. Returns x, the new cache and `{rule: {segment: ...}}` of sums and gates,
    each leading with the segment's layers.
    """
    turn = rotary(model.config, ctx.positions)
    block = Block(model.config, model.attention)
    narrow, slides = mask, None
    if model.config.window is not None:
        # a cache has position p in slot p; packed rows start anew with each example, so there the place in the row
        at = ctx.positions if cache is not None else jnp.arange(mask.shape[2])[None]
        narrow = window_mask(mask, at, model.config.window)
        slides = jnp.isin(jnp.arange(model.config.layers), jnp.array(model.config.sliding))
    stats, gates = {}, {}

    for segment in model.segments:
        active = [(rule, E) for rule, E in zip(model.rules, segment.counts, strict=True) if E]
        names = [rule.name for rule, _ in active]
        shared = {name: adapters[name].get("shared", {}) for name in names}
        own = {name: adapters[name].get(segment.name, {}) for name in names}
        whole = jax.lax.stop_gradient(own) if model.engine.alone else None  # read by expert (`tiles.InStack`)

        def body(loop, xs, segment=segment, active=active, shared=shared, cache=cache, whole=whole):
            x, carry, kv = loop
            index, own, own_state = xs
            base = jax.tree.map(
                lambda w: checkpoint_name(jax.lax.dynamic_index_in_dim(w, index, 0, False), "base"), params
            )
            layer = Layer(
                model.config, segment, active, model.losses, (own, shared, own_state), carry,
                ctx.replace(layer=index), given, collect, model.engine,
                None if whole is None else (whole, index - segment.start),
            )  # fmt: skip
            store = None
            if kv is not None:
                k_all, v_all = kv

                def store(k, v):
                    k_new = cache[2](jax.lax.dynamic_index_in_dim(k_all, index, 0, False), k)
                    v_new = cache[2](jax.lax.dynamic_index_in_dim(v_all, index, 0, False), v)
                    put = jax.lax.dynamic_update_index_in_dim
                    return k_new, v_new, (put(k_all, k_new, index, 0), put(v_all, v_new, index, 0))

            seen = mask if slides is None else jnp.where(slides[index], narrow, mask)
            x, kv = block.apply({"params": base}, x, layer, turn, seen, store)
            return (constrain(x), layer.carry, kv), (layer.stats, layer.routings)

        body = jax.checkpoint(body, policy=REMAT[model.remat], prevent_cse=False) if ctx.train else body
        own_state = {name: state.get(name, {}).get(segment.name, {}) for name in names}
        xs = (jnp.arange(segment.start, segment.stop), own, own_state)
        kv = None if cache is None else cache[:2]
        (x, carry, kv), (seg_stats, seg_gates) = jax.lax.scan(body, (x, carry, kv), xs)
        cache = None if cache is None else (*kv, cache[2])
        for name in names:
            stats.setdefault(name, {})[segment.name] = seg_stats.get(name, {})
            gates.setdefault(name, {})[segment.name] = seg_gates.get(name, {})
    return x, cache, stats, gates
