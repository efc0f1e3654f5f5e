"""The acceptance list of MoS: counts, LoRA as a special case, gradients of the pools, tables, init, expansion."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import common
from molora_jax.adapters.mos import Mos, to_lora
from molora_jax.backbones.compile import compile_model
from molora_jax.config.fields import ATTENTION, FFN
from molora_jax.core import trees
from molora_jax.core.trees import count
from molora_jax.core.types import Site
from molora_jax.errors import InputError
from tests.acceptance import helpers
from tests.acceptance.helpers import SMALL, batch, build, gradient, hidden, randomised

PROJECTIONS = (*ATTENTION, *FFN)
SITES = f"{common.ATTENTION},{common.FFN}"
L = SMALL.layers


def rule(name="mos", sites=SITES, *, rank=4, alpha=8.0, **more):
    more = dict(budget=3, private=1, shards=2, dissociate=True) | more if name == "mos" else more
    return dict(all=common.rule(sites, adapter=common.adapter(name, rank=rank, alpha=alpha, dropout=0.0, **more)))


as_lora = functools.partial(jax.jit, static_argnums=0)(to_lora)


def expanded(model, adapters):
    """As the tree of a plain LoRA run."""
    leaves = {s: as_lora(model.rules[0].adapter, adapters["all"]["000-002"][s], adapters["all"]["shared"][s])
              for s in adapters["all"]["shared"]}  # fmt: skip
    return {"all": {"000-002": leaves}}


def test_acceptance_1_trainable_parameters_are_e_L_sum_of_widths():
    llama = dataclasses.replace(
        SMALL, layers=32, width=4096, ffn_width=11008, heads=32, kv_heads=32, head_dim=128, vocab=32000
    )
    config = helpers.rules_config(rule(rank=8, budget=2, shards=4))
    model = compile_model(config, llama)
    kernels = {s: {"kernel": jax.ShapeDtypeStruct((32, *llama.dims(s)), jnp.float32)} for s in PROJECTIONS}
    shapes = jax.eval_shape(model.init_adapters, jax.random.key(0), {"blocks": kernels})
    trainable, fixed = trees.split(shapes, model.frozen_patterns())
    assert count(trainable) == 4_997_120 == 2 * 32 * sum(sum(llama.dims(s)) for s in PROJECTIONS)
    assert count(fixed) == 2 * 8 * 4 * 32 * 7, "r n integers a table"
    assert {str(x.dtype) for x in jax.tree.leaves(fixed)} == {"int32"}
    assert {str(x.dtype) for x in jax.tree.leaves(trainable)} == {"float32"}


def test_acceptance_2_all_private_whole_vectors_train_as_plain_lora():
    model, params, adapters = build(rule(rank=3, budget=3, private=3, shards=1))
    plain, _, _ = build(rule("lora", rank=3))
    both = [(model, adapters), (plain, expanded(model, adapters))]
    ends = []
    for model, tree in both:
        trainable, fixed = trees.split(tree, model.frozen_patterns())
        optimizer = optax.adamw(1e-2)
        state = optimizer.init(trainable)
        assert all(jnp.issubdtype(x.dtype, jnp.floating) or not x.shape for x in jax.tree.leaves(state)), "no int state"
        for step in range(5):
            loss, grads = gradient(model, params, trees.merge(trainable, fixed), batch(step))
            updates, state = optimizer.update(grads, state, trainable)
            trainable = optax.apply_updates(trainable, updates)
        ends.append((float(loss), trees.merge(trainable, fixed)))
    np.testing.assert_allclose(ends[0][0], ends[1][0], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), expanded(both[0][0], ends[0][1]), ends[1][1])


def test_acceptance_3_pool_gradient_is_the_scatter_add_over_layers():
    model, params, adapters = build(rule())
    adapters = randomised(adapters)
    plain, _, _ = build(rule("lora"))
    _, of_pools = gradient(model, params, adapters, batch())
    _, of_factors = gradient(plain, params, expanded(model, adapters), batch())
    unused = 0
    for site in PROJECTIONS:
        tables, dense = adapters["all"]["000-002"][site], of_factors["all"]["000-002"][site]
        for pool, table, factor in (("P_A", "I_A", "A"), ("P_B", "I_B", "B")):
            got = np.asarray(of_pools["all"]["shared"][site][pool])
            wanted = np.zeros_like(got)
            rows = np.asarray(tables[table]).reshape(-1)
            np.add.at(wanted, rows, np.asarray(dense[factor]).reshape(len(rows), -1))
            np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-7)
            idle = np.setdiff1d(np.arange(len(got)), rows)
            assert (got[idle] == 0).all() and len(idle) < len(got)
            unused += len(idle)
    assert unused > 0, "the case must have rows that no table names"


def test_acceptance_4_a_private_row_moves_its_own_layer_only():
    model, params, adapters = build(rule())
    adapters = randomised(adapters)
    before = expanded(model, adapters)["all"]["000-002"]["up"]
    n, public = 2, 2 * L * 2
    pool = adapters["all"]["shared"]["up"]
    for layer in range(L):
        moved = jax.tree.map(np.array, pool)
        for rows in moved.values():
            rows[public + layer * n] += 1.0
        after = as_lora(model.rules[0].adapter, adapters["all"]["000-002"]["up"], moved)
        for factor in ("A", "B"):
            change = np.abs(after[factor] - before[factor]).reshape(L, -1).max(axis=1)
            assert (change > 0).tolist() == [i == layer for i in range(L)]


def test_acceptance_5_assembly_on_a_hand_made_example():
    adapter = Mos(rank=2, budget=1, private=0, shards=2)
    pool = {"P_A": jnp.arange(8.0).reshape(4, 2), "P_B": 10 + jnp.arange(4.0).reshape(4, 1)}
    tables = {"I_A": jnp.array([[[2, 0, 1, 3]], [[3, 2, 0, 1]]]), "I_B": jnp.array([[[0, 3, 2, 1]], [[1, 0, 3, 2]]])}
    both = to_lora(adapter, tables, pool)
    # row j is entries j n .. j n + n - 1 end to end; the paper's code gathers all and takes the slices [i::n]
    np.testing.assert_array_equal(both["A"][:, 0], [[[4, 5, 0, 1], [2, 3, 6, 7]], [[6, 7, 4, 5], [0, 1, 2, 3]]])
    np.testing.assert_array_equal(both["B"][:, 0], [[[10, 13], [12, 11]], [[11, 10], [13, 12]]])
    for layer in range(2):
        gathered = pool["P_A"][tables["I_A"][layer, 0]]
        np.testing.assert_array_equal(both["A"][layer, 0], jnp.concatenate([gathered[i::2] for i in range(2)], axis=1))


def test_acceptance_6_tables_differ_in_public_agree_in_private_repeat_nothing_and_are_saved(tmp_path):
    from molora_jax.runs.checkpoints import Checkpoints

    model, params, adapters = build(rule())
    n, public = 2, 2 * L * 2
    for site, tables in adapters["all"]["000-002"].items():
        A, B = (np.asarray(tables[name])[:, 0] for name in ("I_A", "I_B"))
        assert A.dtype == np.int32 and A.shape == (L, 4 * n)
        assert (A[:, -n:] == B[:, -n:]).all() and (A[:, :-n] != B[:, :-n]).any(axis=1).all(), site
        assert (A[:, -n:] == public + np.arange(L * n).reshape(L, n)).all()
        for row in (*A, *B):
            assert len(set(row)) == len(row) and (row[:-n] < public).all() and row.max() < 3 * L * n
        assert len({tuple(row) for row in A}) > 1, "layers draw apart"
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    with checkpoints:
        checkpoints.save(0, {"adapters": adapters, "opt": {"x": np.zeros(1)}, "router_state": {},
                             "train": {"step": np.int32(0)}}, meta={})  # fmt: skip
    again = checkpoints.restore(0, {"adapters": jax.tree.map(np.zeros_like, adapters)})["adapters"]
    jax.tree.map(np.testing.assert_array_equal, adapters, again)
    tied, _, same = build(rule(dissociate=False))
    for tables in same["all"]["000-002"].values():
        np.testing.assert_array_equal(tables["I_A"], tables["I_B"])


def test_acceptance_7_starts_as_the_base_and_scales_by_the_active_rank():
    model, params, adapters = build(rule(rank=4, alpha=8.0))
    start, alone = hidden(model, params, adapters, batch()), hidden(model.without_rules(), params, {}, batch())
    np.testing.assert_array_equal(start, alone)
    assert model.rules[0].adapter.scale() == 8.0 / 4
    for site in PROJECTIONS:
        pool = np.asarray(adapters["all"]["shared"][site]["P_A"])
        bound = SMALL.dims(site)[0] ** -0.5
        assert 0.8 * bound < np.abs(pool).max() <= bound, "the fan-in is that of the whole vector"


def test_acceptance_8_expansion_and_merging_give_the_same_logits():
    model, params, adapters = build(rule())
    adapters = randomised(adapters)
    plain, _, _ = build(rule("lora"))
    keep = batch()["segment_ids"] > 0
    logits = lambda m, p, a: np.asarray(m.logits(p, hidden(m, p, a, batch())))[keep]  # noqa: E731
    wanted, lora = logits(model, params, adapters), expanded(model, adapters)
    np.testing.assert_allclose(logits(plain, params, lora), wanted, atol=1e-5)
    blocks = dict(params["blocks"])
    for site, f in lora["all"]["000-002"].items():
        change = plain.rules[0].adapter.scale() * jnp.einsum("lerd,lero->ldo", f["A"], f["B"])
        blocks[site] = {"kernel": blocks[site]["kernel"] + change}
    np.testing.assert_allclose(logits(plain.without_rules(), params | {"blocks": blocks}, {}), wanted, atol=1e-5)


def test_experts_are_instances_of_their_own():
    """A mixture of MoS experts: private rows go to (layer, expert), counts may differ between layers."""
    router = dict(name="softmax_topk", k=1, share="site")
    rules = rule(sites="q,down", rank=4, budget=2)
    rules["all"].update(experts="1*1,2*2", router=router)
    model, params, adapters = build(rules)
    own = [np.asarray(adapters["all"][s]["q"]["I_A"])[:, :, -2:].reshape(-1) for s in ("000-000", "001-002")]
    np.testing.assert_array_equal(np.concatenate(own), 5 * 2 + np.arange(5 * 2))
    one = Site("q", 32, 32, (1, 2), 2, (1, 2, 2))
    again = model.rules[0].adapter.init_leaves(jax.random.key(0), one, jnp.int32(2))
    assert again["I_A"].shape == (2, 8)
    _, grads = gradient(model, params, randomised(adapters), batch())
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    ("change", "field"),
    [(dict(budget=6), "budget"), (dict(private=4), "private"), (dict(shards=5), "shards"), (dict(rank=9), "rank")],
)
def test_what_does_not_fit_is_refused(change, field):
    with pytest.raises(InputError, match=f"method.rules.all.adapter.{field}"):
        build(rule(**change))
