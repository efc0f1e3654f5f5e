"""Bases that route: LoRA on their experts against einsums, the router that trains, what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common, moe_lora
from molora_jax import config as config_lib
from molora_jax import sharding
from molora_jax.backbones.base import BlockContext
from molora_jax.backbones.compile import compile_model
from molora_jax.backbones.families import TINY_MOE
from molora_jax.backbones.llama import Llama
from molora_jax.core import trees
from molora_jax.engines import ENGINES, Engine
from molora_jax.errors import InputError
from molora_jax.io.random_init import random_params
from molora_jax.training.step import decision_sums, site_metrics

SMALL = dataclasses.replace(
    TINY_MOE, layers=2, width=16, heads=2, kv_heads=1, head_dim=8, vocab=32, experts=4, expert_width=12, shared_width=8,
    normalised=False, family="qwen2_moe",
)  # fmt: skip
B, S = 8, 6
SLOW = pytest.mark.slow


def config_of(factors="own", **rule):
    config = common.get_config()
    adapter = rule.pop("adapter", common.adapter(rank=4, dropout=0.0))
    place = dict(name="base_experts", factors=factors)
    config.method.rules = dict(moe=common.rule("ffn", adapter=adapter, placement=place, **rule))
    config.base.source = "random:tiny-moe"
    return config


def checked(config, base=SMALL):
    config_lib.validate(config)
    config_lib.check_model(config, base.layers, base.dims, base.ABSENT)
    return compile_model(config, base)


@functools.cache
def start(model):
    params = random_params(model.config)[0]
    params["blocks"]["router"]["kernel"] *= 4  # no near ties
    return params, jax.device_get(jax.jit(lambda p: model.init_adapters(jax.random.key(0), p))(params))


def problem(model, seed=0):
    """Random parameters and adapters (the router's copy stays near the base's), and rows with padding."""
    rng = np.random.default_rng(seed)
    params, adapters = start(model)
    adapters = jax.tree.map(lambda a: a + 0.1 * rng.standard_normal(a.shape).astype(np.float32), adapters)
    tokens = rng.integers(0, model.config.vocab, (B, S)).astype(np.int32)
    segments = np.ones((B, S), np.int32)
    segments[1, 4:] = 0
    batch = dict(tokens=tokens, segment_ids=segments, positions=np.broadcast_to(np.arange(S, dtype=np.int32), (B, S)))
    return params, adapters, batch, rng.standard_normal((B, S, model.config.width)).astype(np.float32)


def loss_of(model, weight):
    def loss(adapters, params, batch):
        hidden = model.hidden(
            params, adapters, {}, batch, train=True, key=jax.random.key(1), step_key=jax.random.key(2)
        )
        return jnp.sum(jnp.where(batch["segment_ids"][..., None] > 0, hidden[0] * weight, 0.0))

    return jax.jit(jax.value_and_grad(loss))


@functools.cache
def compiled(model):
    """`loss_of` the model's `problem`, which asks for its text as well."""
    params, adapters, batch, weight = problem(model)
    with jax.default_matmul_precision("highest"):
        return loss_of(model, weight).lower(adapters, params, batch).compile()


class Einsums:
    """Stands for `Layer` in a block: every expert's block of every token, weights merged with their change."""

    def __init__(self, model, leaves, scale):
        self.model, self.leaves, self.scale = model, leaves, scale

    def attention(self, h, weights, core):
        q, k, v = (h @ weights[site][0] for site in "qkv")
        return core(q, k, v) @ weights["o"][0]

    def prompted(self, out, q, weights, keys):
        return out

    def base_router(self, W):
        return jnp.swapaxes(self.leaves["router"]["base"]["W"], 0, 1) if "router" in self.leaves else W

    def experts(self, x, routing, kernels, act):
        E = routing.gates.shape[-1]

        def merged(site):
            A, B = (jnp.broadcast_to(self.leaves[site][n], (E, *self.leaves[site][n].shape[1:])) for n in "AB")
            return kernels[site] + self.scale * jnp.einsum("eri,ero->eio", A, B)

        h = jax.nn.silu(jnp.einsum("bsi,eif->bsef", x, merged("gate"))) * jnp.einsum("bsi,eif->bsef", x, merged("up"))
        return jnp.einsum("bse,bsef,efo->bso", routing.gates, h, merged("down"))


def reference(model, weight, stand=Einsums):
    config, rule = model.config, model.rules[0]
    (stack,) = config.stacks

    def loss(adapters, params, batch):
        x, pick = params["embed"][batch["tokens"]], lambda tree, i: jax.tree.map(lambda a: a[i], tree)
        once = config.once(batch["positions"], config.mask(batch["segment_ids"]), cached=False)
        for i in range(config.layers):
            arrays = {name: jnp.array(values)[i] for name, values in stack.arrays}
            at = BlockContext(once, arrays, batch["segment_ids"] > 0, False, "xla")
            adapt = stand(model, pick(adapters[rule.name]["000-001"], i), rule.adapter.scale())
            x, _ = config.block(pick(params["blocks"], i), x, at, adapt, None)
        return jnp.sum(jnp.where(batch["segment_ids"][..., None] > 0, config.norm(params, x) * weight, 0.0))

    return jax.jit(jax.value_and_grad(loss))


def close(found, wanted, limit=1e-4):
    (a, ga), (b, gb) = found, wanted
    np.testing.assert_allclose(a, b, rtol=limit, atol=limit)
    flat = lambda tree: jax.tree_util.tree_leaves_with_path(jax.device_get(tree))  # noqa: E731
    for (path, x), (_, y) in zip(flat(ga), flat(gb), strict=True):
        assert np.linalg.norm(y) > 0 and np.linalg.norm(x - y) < limit * np.linalg.norm(y), path


SHAPES = {
    "own": dict(gate=(4, 4), up=(4, 4), down=(4, 4)), "one": dict(gate=(1, 1), up=(1, 1), down=(1, 1)),
    "shared_outer": dict(gate=(1, 4), up=(1, 4), down=(4, 1)),
}  # fmt: skip


@pytest.mark.parametrize("factors", [pytest.param(f, marks=() if f == "shared_outer" else SLOW) for f in SHAPES])
def test_gradients_of_adapters_and_router_are_those_of_einsums(factors):
    model = checked(config_of(factors, base_router="trained"))
    params, adapters, batch, weight = problem(model)
    own = adapters["moe"]["000-001"]
    assert {s: tuple(own[s][n].shape[1] for n in "AB") for s in SHAPES[factors]} == SHAPES[factors]
    with jax.default_matmul_precision("highest"):
        wanted = reference(model, weight)(adapters, params, batch)
    close(compiled(model)(adapters, params, batch), wanted)
    stats = jax.eval_shape(lambda: model.hidden(params, adapters, {}, batch)[1])
    site = jax.eval_shape(lambda stats: site_metrics(model, decision_sums(stats, "expert_load")), stats)
    assert site["moe/base"]["entropy"].shape == (model.config.layers,), "its decisions are in the metrics"


def test_the_start_changes_nothing_and_a_frozen_router_has_no_leaf():
    model = checked(config_of("own"))
    params, _, batch, _ = problem(model)
    adapters = start(model)[1]
    assert not any("router" in path for path in trees.paths(adapters))
    run = jax.jit(lambda p, a, m=model: m.hidden(p, a, {}, batch)[0])
    plain = model.without_rules()
    np.testing.assert_allclose(run(params, adapters), jax.jit(lambda p: plain.hidden(p, {}, {}, batch)[0])(params))


MESHES = [
    ("replicate", dict(data=2, expert=4)),
    ("gather", dict(fsdp=2, expert=4)),
    ("gather", dict(expert=4, tensor=2)),
]
MESHES += [(name, sizes) for name in ENGINES for sizes in (dict(expert=4, data=2), dict(expert=2, fsdp=2, tensor=2))]
QUICK = [("all_to_all", dict(expert=2, fsdp=2, tensor=2))]


@pytest.mark.parametrize("factors", [pytest.param("own", marks=SLOW), "shared_outer"])
@pytest.mark.parametrize(
    ("engine", "sizes"), [pytest.param(*m, marks=() if m in QUICK else SLOW) for m in MESHES], ids=str
)
def test_eight_devices_under_every_engine(engine, sizes, factors):
    """Values and every gradient are those of one device; the base's kernels lie in shards over `expert`."""
    config = config_of(factors, base_router="trained", adapter=common.adapter(rank=4, dropout=0.2))
    model = checked(config)
    params, adapters, batch, weight = problem(model)
    wanted = loss_of(model, weight)(adapters, params, batch)
    mesh = sharding.make_mesh(dict.fromkeys(sharding.AXES, 1) | sizes)
    many = dataclasses.replace(
        model, engine=Engine(engine, mesh, capacity=0.5)
    )  # a base drops nothing whatever it says
    placed = sharding.put(params, sharding.param_shardings(model.config, params, mesh))
    assert placed["blocks"]["experts"]["gate"].addressable_shards[0].data.shape[1] == 4 // sizes["expert"]
    at = sharding.adapter_shardings(adapters, many, mesh)
    kept = at["moe"]["000-001"]["gate"]["B"].shard_shape((2, 4, 4, 12))[1]
    assert kept == (4 if engine == "replicate" else 4 // sizes["expert"])
    found = loss_of(many, weight)(sharding.put(adapters, at), placed, sharding.put_batch(batch, mesh, B))
    close(found, wanted, 1e-3)


@pytest.mark.parametrize("sites", ["ffn", "gate", "q,down"])
def test_sites_of_a_dense_ffn_are_refused_with_the_reason(sites):
    config = config_of()
    config.method.rules = dict(all=common.rule(sites, adapter=common.adapter()))
    with pytest.raises(InputError, match="no one dense FFN"):
        checked(config)


def test_patterns_mean_the_sites_of_attention():
    config = config_of()
    config.method.rules = dict(all=common.rule("*", adapter=common.adapter()))
    assert checked(config).rules[0].sites == ("q", "k", "v", "o")


REFUSED = {
    "a router": (dict(router=dict(name="softmax_topk", k=2), experts="4"), "router"),
    "an adapter": (dict(adapter=common.adapter("dora")), "lora, rslora or lora_fa"),
    "experts": (dict(experts="4"), "the base says how many experts it has. Leave experts out"),
    "a start": (dict(adapter=common.adapter(init="pissa")), "reads no base weight"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_cannot_serve_is_refused(name):
    rule, words = REFUSED[name]
    with pytest.raises(InputError, match=words):
        checked(config_of(**rule))


def test_other_bases_and_other_placements_are_refused():
    base = Llama("llama", 2, 16, 24, 2, 1, 8, 32, 64, 1e4, 1e-5, True)
    with pytest.raises(InputError, match=r"placement\.name.*no experts of its own"):
        checked(config_of(), base)
    config = config_of()
    config.method.rules = dict(all=common.rule("q", adapter=common.adapter(), base_router="trained"))
    with pytest.raises(InputError, match="base_router"):
        config_lib.validate(config)
    config = config_of()
    config.method.rules.again = config.method.rules.moe
    with pytest.raises(InputError, match="one rule of the placement base_experts"):
        checked(config)


def test_the_shipped_config_compiles_and_counts():
    model = checked(moe_lora.get_config(), TINY_MOE)
    params = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), random_params(TINY_MOE)[0])
    adapters = jax.eval_shape(lambda p: model.init_adapters(jax.random.key(0), p), params)
    pair = TINY_MOE.width + TINY_MOE.expert_width
    assert trees.count(adapters["moe"]) == 4 * 8 * 3 * 8 * pair  # layers, experts, sites, rank


@pytest.mark.parametrize("factors", ["shared_outer", pytest.param("own", marks=SLOW)])
def test_no_layer_of_the_kernels_is_copied_out_of_the_stack(factors):
    """The compiled step of one device holds no array of a layer's expert kernels, forward or backward."""
    model = checked(config_of(factors, base_router="trained"))
    params, text = problem(model)[0], compiled(model).as_text()
    L, E, D, F = params["blocks"]["experts"]["gate"].shape
    assert f"f32[{L},{E},{D},{F}]" in text
    for shape in ((E, D, F), (1, E, D, F), (E, F, D), (1, E, F, D)):
        assert f"f32[{','.join(map(str, shape))}]" not in text, shape
