"""A stack of layers as a function: one `lax.scan` a segment over `Backbone.block`, inside `jax.checkpoint`.

Base parameters stay stacked `[L, ...]` and are indexed inside the body (slicing the stack into segments outside would
copy it); what a stack names as `by_expert` stays whole and is read by expert. `remat` picks what the backward keeps:
`none` every activation that is not cheap to form again, `dots` the matrix products (those by experts too), `full`
nothing; a layer's base weights are never kept: a sharded base is gathered a layer at a time, twice.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kernels_pallas.tiles import PRODUCT, InStack
from molora_jax.backbones.base import BlockContext, Stack
from molora_jax.backbones.layer import Layer
from molora_jax.core.quant import is_quantised
from molora_jax.core.types import Array, Context

_policies = jax.checkpoint_policies


CHEAP = frozenset(
    "mul neg select_n logistic convert_element_type broadcast_in_dim reshape squeeze transpose concatenate split slice "
    "and or not xor eq ne lt le gt ge shift_right_logical shift_left".split()
)


def _activations(prim, *avals, **params) -> bool:
    """Everything but what costs less than the memory traffic of keeping it, and a layer's base weights.

    CHEAP operations are fused into whatever reads them, so forming them again is nearly free: a dropout mask, a norm's
    product, the factors of a gated activation. Not those on int32, which decisions are made of: a search or a sort
    would run again for them. Base weights go by their name and by the slice that the name is given to.
    """
    sliced = prim.name in ("dynamic_slice", "squeeze") or (prim.name == "name" and params["name"] == "base")
    decision = any(getattr(aval, "dtype", None) == jnp.int32 for aval in avals)
    return not sliced and (decision or prim.name not in CHEAP)


REMAT = {
    "none": _activations,
    "dots": _policies.save_from_both_policies(
        _policies.dots_with_no_batch_dims_saveable, _policies.save_only_these_names(PRODUCT)
    ),
    "full": _policies.nothing_saveable,
}


@dataclasses.dataclass
class LayerCache:
    """What a cache of two buffers `[L, B, ...]` is to the block of one layer: for keys and values, or as a state."""

    buffers: tuple[Array, Array]
    layer: Array
    write: Callable

    def __call__(self, k: Array, v: Array):
        """`(all keys, all values, the new buffers)` with new ones written into their slots."""
        k, v = (self.write(old, new) for old, new in zip(self.state, (k, v), strict=True))
        return k, v, self.replaced(k, v)

    @property
    def state(self) -> tuple[Array, Array]:
        """The layer's own."""
        return tuple(jax.lax.dynamic_index_in_dim(of_all, self.layer, 0, False) for of_all in self.buffers)

    def replaced(self, *new: Array) -> tuple[Array, Array]:
        """The new buffers, with these as the layer's own."""
        put = lambda of_all, own: jax.lax.dynamic_update_index_in_dim(of_all, own, self.layer, 0)  # noqa: E731
        return tuple(put(*pair) for pair in zip(self.buffers, new, strict=True))


class StackRunner:
    """What `Backbone.forward` calls with each of its stacks: `runner(stack, params, x) -> x`.

    `adapters[rule][segment]`, `state` likewise. `carry` by rule goes through the layers; `cache` is `(k, v, write)`,
    `k, v [L, B, S_k, H_kv, H_d]` and `write(buffer [B, ...], new [B, S, ...])`, None without one; `route(x)` gives the
    decisions that are taken once for all layers, from what enters the first: `(given, stats, gates)`; `tap` as of
    `Model.hidden`, `settled` of `Model.settle`.

    Afterwards `cache` is the new one, and `stats`, `gates` `{rule: {segment: ...}}` hold what left the layers, each
    leading with the segment's layers.
    """

    def __init__(
        self, model, adapters, state, ctx: Context, *, mask, carry, cache, route, collect, constrain, tap=None,
        settled=None,
    ):  # fmt: skip
        self.model, self.adapters, self.state, self.ctx = model, adapters, state, ctx
        self.mask, self.carry, self.cache, self.route = mask, carry, cache, route
        self.collect, self.constrain, self.tap, self.settled = collect, constrain, tap, settled or {}
        self.given, self.once = None, None
        self.stats, self.gates = {}, {}

    def __call__(self, stack: Stack, params, x):
        """`params`: the stack's parameters `[layers, ...]`; `x [B, S, D]`."""
        if self.given is None:
            self.given, self.stats, self.gates = self.route(x)
            cached = self.cache is not None
            self.once = self.model.config.once(
                self.ctx.positions, self.mask, cached=cached, segment_ids=self.ctx.segment_ids
            )
        for segment in self.model.segments:
            if stack.start <= segment.start < stack.stop:
                x = self._segment(stack, segment, params, x)
        return x

    def _segment(self, stack, segment, params, x):
        model, config, ctx, cache, tap = self.model, self.model.config, self.ctx, self.cache, self.tap
        active = [(rule, E) for rule, E in zip(model.rules, segment.counts, strict=True) if E]
        names = [rule.name for rule, _ in active]
        shared = {name: self.adapters[name].get("shared", {}) for name in names}
        own = {name: self.adapters[name].get(segment.name, {}) for name in names}
        whole = jax.lax.stop_gradient(own) if model.engine.alone else None  # read by expert (`tiles.InStack`)
        sliced = {name: leaf for name, leaf in params.items() if name not in stack.by_expert}
        experts = jax.lax.stop_gradient({name: params[name] for name in stack.by_expert})
        arrays = {name: jnp.array(values) for name, values in stack.arrays}

        def body(loop, xs):
            x, carry, kv, zeros = loop
            index, own, own_state, settled = xs
            place = index - stack.start if stack.start else index
            base = jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, place, 0, False), sliced)
            base, zeros = (base, zeros) if tap is None else tap.kernels(index, base, zeros)
            base = jax.tree.map(lambda w: checkpoint_name(w, "base"), base)
            base |= jax.tree.map(lambda w: InStack(None, w, place), experts, is_leaf=is_quantised)
            adapt = Layer(
                config, segment, active, model.losses, (own, shared, own_state), carry,
                ctx.replace(layer=index), self.given, self.collect, model.engine,
                None if whole is None else (whole, index - segment.start), settled,
            )  # fmt: skip
            store = None if kv is None else LayerCache(kv, index, cache[2])
            here = {name: values[place] for name, values in arrays.items()}
            adapt.enter("block", x)
            at = BlockContext(self.once, here, ctx.valid, ctx.train, model.attention)
            x, kv = config.block(base, x, at, adapt, store)
            return (self.constrain(x), adapt.carry, kv, zeros), (adapt.stats, adapt.routings)

        body = jax.checkpoint(body, policy=REMAT[model.remat], prevent_cse=False) if ctx.train else body
        own_state = {name: self.state.get(name, {}).get(segment.name, {}) for name in names}
        settled = {r.name: self.settled[r.name][segment.name] for r, _ in active if r.name in self.settled
                   and r.share != "model"}  # fmt: skip
        xs = (jnp.arange(segment.start, segment.stop), own, own_state, settled)
        kv = None if cache is None else cache[:2]
        zeros = {} if tap is None else {site: tap.zeros[site] for site in stack.sites if site in tap.zeros}
        (x, self.carry, kv, zeros), (stats, gates) = jax.lax.scan(body, (x, self.carry, kv, zeros), xs)
        if tap is not None:
            tap.zeros = tap.zeros | zeros
        self.cache = None if cache is None else (*kv, cache[2])
        for name in names:
            for all_of, new in ((self.stats, stats), (self.gates, gates)):
                if new.get(name):
                    all_of.setdefault(name, {})[segment.name] = new[name]
        return x
