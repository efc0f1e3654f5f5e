"""Random sites for the engines' tests, and what they must equal: the mixture on one device, float32.

B rows, S tokens a row, T = B S, D width, F FFN width, E experts, R rank.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from molora_jax import sharding
from molora_jax.adapters import ADAPTERS
from molora_jax.backbones.layer import Layer
from molora_jax.backbones.llama import Llama
from molora_jax.core.rules import Rule, Segment, site
from molora_jax.core.types import Context
from molora_jax.placements import ffn
from molora_jax.routers import ROUTERS

B, S, D, F = 8, 4, 16, 32
CONFIG = Llama(
    family="llama", layers=1, width=D, ffn_width=F, heads=4, kv_heads=2, head_dim=4, vocab=32, context=64,
    rope_base=1e4, norm_eps=1e-5, tied=True,
)  # fmt: skip
SEGMENT = Segment(0, 1, ())


def mesh(**sizes):
    full = {axis: sizes.get(axis, 1) for axis in sharding.AXES}
    return sharding.make_mesh(full, jax.devices()[: int(np.prod(list(full.values())))])


def rule(
    sites,
    experts,
    *,
    adapter="lora",
    router="softmax_topk",
    rank=4,
    dropout=0.0,
    down="once",
    placement=None,
    **options,
):
    return Rule(
        name="r", sites=sites, experts=(experts,), adapter=ADAPTERS[adapter](rank=rank, alpha=8.0, dropout=dropout),
        router=None if router is None else ROUTERS[router](**options), down=down, placement=placement,
    )  # fmt: skip


def weights(seed=0):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.standard_normal(CONFIG.dims(name)) / 4, jnp.float32) for name in
            ("q", "k", "v", "o", "gate", "up", "down")}  # fmt: skip


def leaves(one: Rule, base, *, skew=0.0, seed=1):
    """Random factors, none zero; `skew` pushes every token to the first K experts (the others stay empty)."""
    rng = np.random.default_rng(seed)
    tree = {}
    for name in one.projections:
        at = site(CONFIG, name, SEGMENT, one)
        shapes = jax.eval_shape(lambda at=at, name=name: one.adapter.init_leaves(jax.random.key(0), at, 0,
                                                                               base=base.get(name)))  # fmt: skip
        tree[name] = {k: jnp.asarray(rng.standard_normal(v.shape) / 3 + (k == "m"), v.dtype) for k, v in shapes.items()}
    for scope in one.router_scopes:
        at = site(CONFIG, scope, SEGMENT, one)
        W = rng.standard_normal((at.experts, at.d_in)) * 0.5
        if skew:  # the input's first feature is constant
            W[:, 0] = -skew * np.arange(at.experts)
        tree.setdefault("router", {})[scope] = {"W": jnp.asarray(W, jnp.float32)}
    return tree


def tokens(width=D, seed=2):
    x = np.random.default_rng(seed).standard_normal((B, S, width))
    x[..., 0] = 1.0
    return jnp.asarray(x, jnp.float32)


def apply(on, one: Rule, tree, base, x, *, key=None, site_name=None):
    """The output of a site under an engine, and the layer's statistics; `x [B, S, D_in]`, row 0 ends in padding."""
    zeros = jnp.zeros(x.shape[:2], jnp.int32)
    valid = jnp.ones(x.shape[:2], bool).at[0, -2:].set(False)
    ctx = Context(valid, valid.astype(jnp.int32), zeros, zeros, zeros, key=key, train=True, max_segments=2)
    layer = Layer(
        CONFIG, SEGMENT, [(one, one.experts[0])], (), ({"r": tree}, {}, {"r": {}}), {}, ctx, {}, False, on
    )  # fmt: skip
    if one.sites == ("ffn",):
        return layer.feed_forward(x, {s: (base[s], None) for s in ffn.SITES}, "silu"), layer.stats
    return layer.project(site_name or one.sites[0], base[site_name or one.sites[0]], None, x), layer.stats


@functools.cache
def value_and_grads(on, one, *, key=None, site_name=None, reference=False):
    """A compiled `(tree, base, x) -> y, (gradients of x, of every leaf), statistics` for a fixed projection of y."""

    def loss(x, tree, base):
        if reference:
            y, stats = einsum(one, tree, base, x), {}
        else:
            key_ = None if key is None else jax.random.key(key)
            y, stats = apply(on, one, tree, base, x, key=key_, site_name=site_name)
        target = jnp.asarray(np.random.default_rng(9).standard_normal(y.shape), y.dtype)
        return jnp.sum(y * target), (y, stats)

    def run(tree, base, x):
        (_, (y, stats)), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(x, tree, base)
        return y, grads, stats

    return jax.jit(run)


def einsum(one: Rule, tree, base, x):
    """The mixture as it reads; gates by the rule's own router."""
    name = one.scopes[0]
    at = site(CONFIG, name, SEGMENT, one)
    zeros = jnp.zeros(x.shape[:2], jnp.int32)
    valid = jnp.ones(x.shape[:2], bool).at[0, -2:].set(False)
    ctx = Context(valid, valid.astype(jnp.int32), zeros, zeros, zeros, site=at, max_segments=2)
    gates = one.router.route(tree["router"][name], {}, x, ctx)[0].gates  # [B, S, E]
    scale = one.adapter.scale()

    def delta(name, v):  # [B, S, (E,) D_in] -> [B, S, E, D_out]
        z = jnp.einsum("bsed,erd->bser", jnp.broadcast_to(v, (*gates.shape, v.shape[-1])), tree[name]["A"])
        return scale * jnp.einsum("bser,ero->bseo", z, tree[name]["B"])

    if one.sites != ("ffn",):
        return x @ base[name] + jnp.einsum("bse,bseo->bso", gates, delta(name, x[:, :, None]))
    g, u = x @ base["gate"], x @ base["up"]
    h = jax.nn.silu(g[:, :, None] + delta("gate", x[:, :, None])) * (u[:, :, None] + delta("up", x[:, :, None]))
    y = jnp.einsum("bse,bseo->bso", gates, h @ base["down"] + delta("down", h))
    return y + (1 - gates.sum(-1, keepdims=True)) * ((jax.nn.silu(g) * u) @ base["down"])


def close(a, b, tolerance=2e-6):
    """Equal to `tolerance` of the largest value, leaf by leaf."""
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert np.isfinite(x).all(), path
        np.testing.assert_allclose(x, y, atol=tolerance * max(np.abs(y).max(), 1e-3), err_msg=str(path))
