"""The collectives of the compiled layer scan are those of the engines' formulas, in number, kind and bytes.

`auto.table` leaves out what every engine pays alike: routers and rules that are not routed; here it is added.
"""

import collections
import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from molora_jax import placements, sharding
from molora_jax.backbones.compile import compile_model
from molora_jax.core import trees
from molora_jax.engines import Engine, auto, hlo
from molora_jax.io.base import load_base
from tests import tiny
from tests.engines.problems import mesh

ROWS, LENGTH = 16, 32


@functools.cache
def built(method):
    """`(model, params, shapes of the adapters)`: nothing here is computed."""
    base = load_base("random:tiny")
    model = compile_model(tiny.tiny_config(method), base.config)
    return model, base.params, jax.eval_shape(lambda p: model.init_adapters(jax.random.key(1), p), base.params)


@functools.cache
def compiled(method, engine, *, remat="dots", rules=True):
    """Collectives of the gradients (of adapters and embeddings) of a sum over the final hidden states."""
    model, params, adapters = built(method)
    state = model.init_router_state()
    model = dataclasses.replace(model, engine=engine, remat=remat)
    model = model if rules else model.without_rules()
    where = {"adapters": sharding.adapter_shardings(adapters, model, engine.mesh) if rules else {}}
    params_at = sharding.param_shardings(model.config, params, engine.mesh)
    where["embed"] = params_at["embed"]
    shapes = lambda tree, at: jax.tree.map(  # noqa: E731
        lambda x, s: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=s), tree, at
    )
    given = {"adapters": adapters if rules else {}, "embed": params["embed"]}
    tokens = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32, sharding=sharding.row_sharding(engine.mesh))
    batch = {name: tokens for name in ("tokens", "segment_ids", "positions")}

    def loss(given, params, batch):
        hidden, *_ = model.hidden(
            params | {"embed": given["embed"]}, given["adapters"], state, batch, train=True, key=jax.random.key(1),
            constrain=sharding.constrain(engine.mesh),
        )  # fmt: skip
        return jnp.sum(hidden**2)

    lowered = jax.jit(jax.grad(loss), out_shardings=where).lower(shapes(given, where), shapes(params, params_at), batch)
    return model, adapters, hlo.collectives(lowered.compile().as_text(), engine.mesh.size)


def everywhere(model, adapters, engine):
    """Bytes of the gradient sums of what no engine places: routers and rules without one."""
    routed = {rule.name for rule in model.rules if rule.router is not None}
    total = 0.0
    for path, leaf in zip(trees.paths(adapters), jax.tree.leaves(adapters), strict=True):
        if path.split("/")[0] not in routed or "/router/" in path:
            total += 2 * leaf.size * 4 * (engine.mesh.size - 1) / engine.mesh.size
    return total


def number(model, adapters, engine):
    """Collectives by kind in all layers, as docs/parallelism.md counts them."""
    passes, count = 1 if model.remat == "none" else 2, collections.Counter()
    shardings = sharding.adapter_shardings(adapters, model, engine.mesh)
    rules = {rule.name: rule for rule in model.rules}
    leaves = zip(trees.paths(adapters), jax.tree.leaves(adapters), jax.tree.leaves(shardings), strict=True)
    for path, leaf, own in leaves:
        name, _, site, *_ = path.split("/")
        rule, layers = rules[name], leaf.shape[0]
        at = placements.of(rule)
        times = layers * max(sum(site in at.owns(rule, m) for m in at.meetings(rule)), 1)  # a chain's passes
        count["all-reduce"] += times
        if engine.name == "gather" and "expert" in own.spec:
            count.update({"all-gather": passes * layers, "reduce-scatter": times})
    for rule, segment, _, site in auto.routed(model):
        if engine.moves_tokens:
            back = 2 if placements.of(rule).ends(rule, site) else passes + 1
            count["all-to-all"] += len(segment.layers) * (passes + 2 * (passes + 1) + back)  # ids, gates and rows, back
    return count


def rule_of(sites, adapter):
    router = dict(name="softmax_topk", k=2, share="site")
    return dict(all=tiny.common.rule(sites, adapter=adapter, experts="4", router=router))


PLAIN = tiny.common.adapter()
METHODS = {"projections": rule_of("q,down", PLAIN), "four projections": rule_of("q,o,up,down", PLAIN)}
METHODS["mixlora"] = dict(  # attention as little as says that an unrouted rule's sums are counted
    attn=tiny.common.rule("q,o", adapter=PLAIN),
    ffn=tiny.common.rule("ffn", adapter=PLAIN, experts="8", router=dict(name="softmax_topk", k=2, share="ffn")),
)
METHODS["chain"] = rule_of("ffn", PLAIN)
METHODS["chain"]["all"]["placement"] = dict(
    name="chain", iterations=2, gating="independent", residual="inner", nonlinearity="none"
)


@pytest.mark.parametrize(
    "method, engine, remat",
    [
        ("mixlora", "replicate", "dots"),
        pytest.param("dora", "replicate", "dots", marks=pytest.mark.slow),
        pytest.param("mixlora", "gather", "full", marks=pytest.mark.slow),
        ("dora", "gather", "full"),
        ("mixlora", "gather", "none"),
        pytest.param("dora", "gather", "none", marks=pytest.mark.slow),
        ("mixlora", "all_to_all", "dots"),
        ("mixlora", "all_to_all", "none"),
        ("projections", "all_to_all", "dots"),
        ("four projections", "all_to_all in rank space", "dots"),
        ("chain", "gather", "dots"),
        pytest.param("chain", "replicate", "dots", marks=pytest.mark.slow),
        ("chain", "all_to_all", "dots"),
        pytest.param("chain", "all_to_all in rank space", "dots", marks=pytest.mark.slow),
    ],
)
def test_the_layer_scan_ships_what_the_formula_says(method, engine, remat, monkeypatch):
    monkeypatch.setattr(tiny, "METHODS", tiny.METHODS | METHODS)
    name, _, rank_space = engine.partition(" in ")
    engine = Engine(name, mesh(data=2, expert=4), rank_space=bool(rank_space))
    model, adapters, found = compiled(method, engine, remat=remat)
    found = [c for c in found if c.loop and c.devices > 1]
    tokens = ROWS * LENGTH // 8
    row = next(r for r in auto.table(model, engine, tokens=tokens, itemsize=4) if r.name == name)
    assert row.refused == ""
    moved = sum(c.bytes_moved for c in found)
    assert moved == pytest.approx(row.shipped + everywhere(model, adapters, engine), rel=0.05)
    count = collections.Counter()
    for c in found:  # XLA joins sums into one with many results; an all-to-all's results are its P pieces
        count[c.kind] += c.times * (1 if c.kind == "all-to-all" else len(c.shapes))
    assert count == number(model, adapters, engine)


NARROW = tiny.common.adapter(rank=4)  # T K R numbers are fewer than T D / 4 or T F / 4
NARROW_METHODS = {
    "lora": dict(all=tiny.common.rule("q,k,v,o,gate,up,down", adapter=NARROW)),
    "mixlora": dict(attn=tiny.common.rule("q,o", adapter=NARROW), ffn=rule_of("ffn", NARROW)["all"]),
    "projections": rule_of("q,o,up,down", NARROW),
}


@pytest.mark.parametrize(
    "method, name",
    [("lora", "replicate"), *itertools.product(["mixlora", "projections"], ["replicate", "gather", "all_to_all"])],
)
def test_tensor_parallelism_adds_no_wide_collective(method, name, monkeypatch):
    """Activations that cross `tensor`: the base model's own, with rules or without."""
    monkeypatch.setattr(tiny, "METHODS", {f"narrow {k}": v for k, v in NARROW_METHODS.items()})

    def wide(method, name, rules=True):
        """More than the rank activations of all slots: D, F or a quarter of them for every token."""
        found = compiled(f"narrow {method}", Engine(name, mesh(expert=2, tensor=4)), rules=rules)[2]
        return collections.Counter(
            (c.kind, shape) for c in found if c.loop and c.devices in (4, 8) for shape in c.shapes
            if np.prod(shape) > ROWS * LENGTH // 2 * 2 * 4
        )  # fmt: skip

    base, ours = wide("lora", "replicate", rules=False), wide(method, name)
    assert base, "the base model's own sums are found"
    if (method, name) == ("mixlora", "all_to_all"):  # one sum for the inputs of gate, up and the experts
        assert ours.total() == base.total() - 1 and not ours - base
    else:
        assert ours == base


def test_the_reader_counts_loops_and_groups():
    text = """
%body (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %ag = f32[4,8]{1,0} all-gather(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %ar = (f32[8]{0}, f32[2,2]{1,0}) all-reduce(%a, %b), replica_groups=[1,8]<=[8], to_apply=%add
}

ENTRY %main (p: f32[4,8]) -> f32[4,8] {
  %w = (s32[], f32[4,8]) while(%t), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %rs = f32[2,8]{1,0} reduce-scatter(%y), replica_groups={{0,1}}, dimensions={0}
  %ap = f32[16]{0} all-to-all(%z), channel_id=1, replica_groups=mesh['data'=2,'fsdp'=1,'expert'=4] {'data','fsdp'}
  %rows = f32[64,8]{1,0} broadcast(%c), dimensions={}
  %ra = f32[16,8]{1,0} ragged-all-to-all(%rows, %out, %i, %s, %o, /*index=5*/%r), replica_groups={{0,1,2,3},{4,5,6,7}}
}
"""
    found = {c.kind: c for c in hlo.collectives(text, 8)}
    assert found["all-gather"].bytes_moved == 3 * 4 * 8 * 4 * 3 / 4 and found["all-gather"].loop
    assert found["all-reduce"].bytes_moved == 3 * 2 * (8 + 4) * 4 * 7 / 8
    assert found["reduce-scatter"].bytes_moved == 2 * 8 * 4 and not found["reduce-scatter"].loop
    assert found["all-to-all"].devices == 2
    assert found["ragged-all-to-all"].bytes_moved == 16 * 8 * 4 * 3 / 4


def test_the_reader_knows_what_starts_and_ends_elsewhere():
    """As a GPU's compiler writes it: a sum's start holds its results alone, others their operands too."""
    text = """
ENTRY %main (p: f32[4,8]) -> f32[4,8] {
  %ags = ((f32[4,8]{1,0}, f32[2,8]{1,0}), (f32[8,8]{1,0}, f32[4,8]{1,0})) all-gather-start(%a, %b), replica_groups={{0,1},{2,3}}
  %agd = (f32[8,8]{1,0}, f32[4,8]{1,0}) all-gather-done(%ags)
  %ars = (f32[16]{0}, f32[8]{0}) all-reduce-start(%x, %y), replica_groups={{0,1,2,3}}, to_apply=%add
  %ard = (f32[16]{0}, f32[8]{0}) all-reduce-done(%ars)
  %cps = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%z), source_target_pairs={{0,1},{1,0},{2,3},{3,2}}
  %cpd = f32[8]{0} collective-permute-done(%cps)
}
"""  # noqa: E501
    found = {c.kind: c for c in hlo.collectives(text, 4)}
    assert len(found) == 3 and found["all-gather"].shapes == ((8, 8), (4, 8))
    assert found["all-reduce"].shapes == ((16,), (8,)) and found["all-reduce"].bytes_moved == 2 * 24 * 4 * 3 / 4
    assert found["collective-permute"].shapes == ((8,),) and found["collective-permute"].devices == 2


def test_the_reader_knows_groups_of_a_mesh_whose_devices_are_in_another_order():
    text = """
ENTRY %main (p: f32[4,8]) -> f32[4,8] {
  %ag = f32[1,64,32]{2,0,1} all-gather(%x), channel_id=3, replica_groups=mesh['a'=1,'b'=4,'c'=1,'d'=2], device_ids=([2,4]T(1,0)) {'b'}, dimensions={1}
}
"""  # noqa: E501
    (found,) = hlo.collectives(text, 8)
    assert found.devices == 4 and found.bytes_moved == 64 * 32 * 4 * 3 / 4
