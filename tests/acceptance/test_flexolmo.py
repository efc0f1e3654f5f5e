"""FlexOlmo: the acceptance list of its specification, item by item (numbers are the list's), and what it asks beside.

Experts are LoRA on the feed-forward block, so "the FFN of expert i" is W + s B_i A_i in gate, up and down.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from configs import common, flexolmo
from molora_jax import config as schema
from molora_jax import data as data_lib
from molora_jax.backbones.compile import compile_model
from molora_jax.core.types import Routing, Site
from molora_jax.data.packing import empty_batch, write_segment
from molora_jax.errors import InputError
from molora_jax.evaluation.run import load_run
from molora_jax.io.base import load_base
from molora_jax.io.base_facts import base_facts
from molora_jax.losses import LOSSES
from molora_jax.routers import ROUTERS
from molora_jax.runs import written
from molora_jax.runs.expert_runs import load_experts
from molora_jax.runs.saved import read_config, without_inputs
from molora_jax.runs.warm_start import load_adapters
from molora_jax.runs.without import leave_out
from molora_jax.training.loop import train
from tests.acceptance import helpers, small
from tests.battery import reference
from tests.battery.cases import fresh_adapters

ROUTER = ROUTERS["document_rows"]
RULE = "method__rules__ffn__"
D, DOCUMENTS, TEXTS = 16, 5, {"legal": "Article {0} of the law", "code": "x = {0} + 1", "public": "The number {0}"}


def leaves_of(E, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jax.device_put(np.float32(scale * rng.standard_normal(shape)))  # noqa: E731
    return {"W": draw(E, D), "r0": draw(1, D), "beta": -jnp.abs(draw(E))}


def oracle(p, x, k=0, renormalise=False, allowed=None):
    """Float64: `(gates [..., 1 + E] with the base first, logits [..., 1 + E])`, written from the paper."""
    p = {name: np.asarray(leaf, np.float64) for name, leaf in p.items()}
    z = np.concatenate([x @ p["r0"].T, x @ p["W"].T + np.minimum(p["beta"], 0)], axis=-1)
    if allowed is not None:
        z = np.where(np.r_[True, allowed], z, -np.inf)
    e = np.exp(z - z.max(-1, keepdims=True))
    probs = e / e.sum(-1, keepdims=True)
    kept = np.argsort(np.argsort(-probs, axis=-1), axis=-1) < (k or probs.shape[-1])
    gates = np.where(kept, probs, 0.0)
    return gates / (gates.sum(-1, keepdims=True) if renormalise else 1.0), z


def route(p, x, **options):
    ctx = small.context(*x.shape[:2], allowed=options.pop("allowed", None))
    return small.routed(ROUTER(**options), p, {}, jnp.asarray(x, jnp.float32), ctx)[0]


def inputs(rows=2, length=6):
    return np.random.default_rng(1).standard_normal((rows, length, D))


def build(E, **changes):
    return small.build("flexolmo", **{f"{RULE}experts": str(E)} | changes)


def hidden(model, params, adapters, data):
    return np.asarray(helpers.hidden(model, params, adapters, data))


# ---- owners' runs ----------------------------------------------------------------------------------------------------


def config_of(folder, owners, public="public", steps=2, load=(), documents=0, **router):
    """`configs/flexolmo.py` on files of a few rows."""
    config = flexolmo.get_config(owners=owners, public=(public,), load=load, documents=documents)
    files = [folder / f"{name}.jsonl" for name in (*owners, public)]
    for name, file in zip((*owners, public), files, strict=True):
        rows = [{"prompt": TEXTS[name].format(i), "target": str(i % 7)} for i in range(60)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config.base.source = "random:tiny"
    config.data.update(tasks=",".join(f"jsonl:{file}" for file in files), seq_len=64)
    config.schedule.s00.tasks = ",".join(f"jsonl:{file}" for file in files[:-1])
    config.method.rules.ffn.adapter.update(rank=3, alpha=6.0, dropout=0.0)
    config.method.rules.ffn.router.update(documents=documents if load else DOCUMENTS, **router)
    config.optim.update(learning_rate=2e-2, warmup=0, weight_decay=0.1)
    config.train.update(steps=steps, batch_size=8, save_every=0)
    schema.validate(config)
    return config


@pytest.fixture(scope="module")
def owners(tmp_path_factory):
    """Two owners' runs: one trained two steps, with decay, and one of leaves away from those. `{name: folder}`."""
    folder = tmp_path_factory.mktemp("owners")
    train(config_of(folder, ("code",)), str(folder / "code"), note=lambda text: None)
    rng = np.random.default_rng(6)
    away = lambda path, x: x if path.endswith("/r0") else x + 0.05 * np.float32(rng.standard_normal(x.shape))  # noqa: E731
    return {"code": folder / "code", "legal": rewritten(folder / "code", folder / "legal", "legal", away)}


def rewritten(old, new, owner, change):
    """An owner's run that is another one with `change(path, leaf)` in place of its leaves."""
    base = load_base("random:tiny")
    leaves = {path: change(path, leaf) for path, leaf in flatten_dict(load_adapters(str(old)), sep="/").items()}
    return written.write(
        new, config=config_of(old.parent, (owner,)), backbone=base.config,
        items={"adapters": unflatten_dict(leaves, sep="/"), "router_state": {}},
        facts=dict(base_digest=base.digest, data_fingerprint="", base=base_facts(base)),
    )  # fmt: skip


def joined(owners, names, **router):
    """`(config, model, params, adapters)` of owners' runs, joined."""
    folder = owners["legal"].parent
    config = config_of(folder, tuple(names), load=tuple(str(owners[name]) for name in names), **router)
    base = load_base("random:tiny")
    model = compile_model(config, base.config)
    fresh = jax.device_get(fresh_adapters(model, jax.random.key(9), base.params))
    return config, model, base.params, load_experts(model, fresh, {"digest": base.digest})


def data_of(vocab):
    return small.batch() | {"tokens": np.random.default_rng(3).integers(1, vocab, (small.B, small.S)).astype(np.int32)}


def without(found, names):
    """A joined model without experts of these names: `(model, params, adapters)`."""
    config, model, params, adapters = found
    with config.copy_and_resolve_references().unlocked() as config:
        config.eval.without = names
    _, model, items = leave_out(config, model, params, {"adapters": adapters, "router_state": {}})
    return model, params, items["adapters"]


def test_acceptance_1_an_owners_start_is_the_public_model():
    for renormalise in (False, True):
        model, params, adapters, _ = build(1, **{f"{RULE}router__renormalise": renormalise, f"{RULE}router__top_k": 2})
        flat = flatten_dict(adapters, sep="/")
        start = unflatten_dict({k: 0 * v if k.endswith("/B") else v for k, v in flat.items()}, sep="/")
        data = small.batch()
        base = hidden(model.without_rules(), params, {}, data)
        got = hidden(model, params, start, data)
        assert np.abs(model.logits(params, got) - model.logits(params, base)).max() < 1e-5
        gates = np.asarray(small.gates(model, params, start, {}, data)["ffn"]["000-001"]["ffn"])
        gates = gates[:, data["segment_ids"] > 0]
        assert 0.01 < gates.min() and gates.max() < 0.99, "both experts have a part in it"
        assert np.abs(hidden(model, params, adapters, data) - base).max() > 1e-2


def test_acceptance_2_only_an_owners_own_leaves_move(owners):
    """Weight decay is on: what is frozen is no part of the optimizer."""
    folder = owners["code"]
    end = flatten_dict(load_adapters(str(folder)), sep="/")
    r0 = next(leaf for path, leaf in end.items() if path.endswith("/r0"))
    np.testing.assert_array_equal(r0, embedding_of(folder.parent, "code", "public")[None, None].repeat(4, 0))
    W = next(leaf for path, leaf in end.items() if path.endswith("/W"))
    assert np.abs(W - embedding_of(folder.parent, "code", "code")).max() > 1e-3
    assert all(np.abs(leaf).max() > 0 for path, leaf in end.items() if path.endswith(("/B", "/beta")))
    tree = json.loads((folder / "checkpoints" / "2" / "manifest.json").read_text())["tree"]
    assert "modules" not in tree and len(end) == 3 * 2 + 3, "no copy of the base: nothing of it could move"


def embedding_of(folder, owner, task):
    """The mean embedding of a task's documents as a run has it, by the model itself (float64: see below)."""
    from molora_jax.training import documents as lib

    config = config_of(folder, (owner,))
    base = load_base("random:tiny")
    data = data_lib.build(config.data, tokenizer=base.tokenizer, batch_size=8, seed=0)
    split, at = data.splits["train"], data.task_names.index(task)
    batch = empty_batch(lib.ROWS, data.seq_len, pad_id=data.pad_id)
    for row, i in enumerate(np.flatnonzero(split.task_ids == at)[:DOCUMENTS]):
        ids = split.tokens(i)
        write_segment(batch, row, 0, 1, ids=ids, mask=np.zeros(len(ids)), task_id=0, example_id=0)
    model = compile_model(config, base.config).without_rules()
    found = np.asarray(lib.embed(base.params, batch, model=model))[:DOCUMENTS]
    h = reference.forward(np, model, reference.as_float64(base.params), {}, batch)[0]
    total = np.stack([h[i][batch["segment_ids"][i] > 0].sum(0) for i in range(DOCUMENTS)])
    wanted = total / np.linalg.norm(total, axis=1, keepdims=True)
    np.testing.assert_allclose(found, wanted, atol=2e-6)
    return np.mean(found, axis=0).astype(np.float32)


def test_acceptance_2_owners_in_one_run_do_not_meet():
    """`route="apart"`: a task's tokens give the leaves of other owners a gradient of exactly 0."""
    rule = common.rule(
        "ffn", experts="3", adapter=common.adapter(rank=2, alpha=4.0, dropout=0.0),
        router=dict(name="document_rows", share="ffn"),
    )  # fmt: skip
    model, params, adapters = helpers.build(dict(ffn=rule))
    adapters, data = helpers.randomised(adapters), helpers.batch()  # of the tasks 0 and 1
    model = dataclasses.replace(model, route="apart")
    gradient = flatten_dict(helpers.gradient(model, params, adapters, data)[1], sep="/")
    for path, g in gradient.items():
        assert np.abs(g[:, 2]).max() == 0, path
        assert path.endswith("beta") or np.abs(g[:, :2]).max(axis=(0, *range(2, g.ndim))).min() > 0, path
    gates = np.asarray(
        small.gates(model, params, adapters, {}, data, train=True, key=jax.random.key(0))["ffn"]["000-002"]["ffn"]
    )
    keep = data["segment_ids"] > 0
    own = data["task_ids"][keep][:, None] == np.arange(3)
    assert (gates[:, keep][:, ~own] == 0).all() and (gates[:, keep][:, own] > 0).all() and (gates < 1).all()


def test_acceptance_3_owners_of_another_public_row_are_refused(owners, tmp_path):
    folder = owners["legal"].parent
    of_another = lambda path, x: x + 1 if path.endswith("/r0") else x  # noqa: E731
    rewritten(owners["legal"], tmp_path / "legal", "legal", of_another)
    with pytest.raises(InputError, match=r"method.rules.ffn.load: got .*rows r_0 of the base differ"):
        joined({"legal": tmp_path / "legal", "code": owners["code"]} | {"x": folder}, ("legal", "code"))


def test_acceptance_3_another_base_is_refused(owners):
    config, model, params, adapters = joined(owners, ("legal", "code"))
    with pytest.raises(InputError, match="expected one on base 0000"):
        load_experts(model, adapters, {"digest": "0" * 64})


def test_acceptance_3_the_order_of_owners_changes_nothing(owners):
    one, other = joined(owners, ("legal", "code")), joined(owners, ("code", "legal"))
    data = data_of(one[1].config.vocab)
    a, b = (hidden(*found[1:], data) for found in (one, other))
    np.testing.assert_allclose(a, b, atol=2e-6)
    W, W2 = (np.asarray(found[3]["ffn"]["000-003"]["router"]["ffn"]["W"]) for found in (one, other))
    np.testing.assert_array_equal(W, W2[:, ::-1])
    assert (np.asarray(one[3]["ffn"]["000-003"]["router"]["ffn"]["beta"]) == 0).all(), "merge_bias drops them"


@pytest.mark.parametrize("merge_bias", ["keep", "drop"])
def test_acceptance_4_a_merge_with_one_owner_left_is_that_owners_model(owners, merge_bias):
    found = joined(owners, ("legal", "code"), merge_bias=merge_bias)
    data = data_of(found[1].config.vocab)
    got = hidden(*without(found, "legal"), data)
    run = load_run(owners["code"])
    own = jax.device_get(run.adapters)
    if merge_bias == "drop":
        router = own["ffn"]["000-003"]["router"]["ffn"]
        assert np.abs(router["beta"]).max() > 0
        router["beta"] = 0 * router["beta"]
    np.testing.assert_array_equal(got, hidden(run.model, run.params, own, data))


def test_acceptance_5_left_out_is_never_there_and_nothing_of_it_is_read(owners):
    found = joined(owners, ("legal", "code"))
    data = data_of(found[1].config.vocab)
    config, model, params, adapters = found
    flat = flatten_dict(jax.tree.map(np.array, adapters), sep="/")
    for path, leaf in flat.items():
        if not path.endswith("/r0"):
            leaf[:, 0] = np.nan  # of legal
    spoilt = config, model, params, unflatten_dict(flat, sep="/")
    got = hidden(*without(spoilt, "legal"), data)
    _, alone, _, own = joined(owners, ("code",))
    np.testing.assert_array_equal(got, hidden(alone, params, own, data))
    whole = hidden(model, params, adapters, data)
    keep = data["segment_ids"] > 0
    assert np.abs(got - whole)[keep].max() > 1e-4
    np.testing.assert_array_equal(
        hidden(*without(found, "legal,code"), data)[keep], hidden(model.without_rules(), params, {}, data)[keep]
    )


def test_acceptance_5_softmax_spreads_over_the_rest():
    p, x = leaves_of(3), inputs()
    allowed = np.array([True, False, True])
    wanted, _ = oracle(p, x, allowed=allowed)
    for mask in (allowed, np.broadcast_to(allowed, (2, 3)), np.broadcast_to(allowed, (2, 6, 3))):
        decision = route(p, x, allowed=jnp.asarray(mask))
        np.testing.assert_allclose(decision.gates, wanted[..., 1:], atol=1e-6)
        np.testing.assert_allclose(decision.base_gate, wanted[..., 0], atol=1e-6)
    smaller = {"W": p["W"][allowed], "r0": p["r0"], "beta": p["beta"][allowed]}
    np.testing.assert_allclose(route(smaller, x).gates, wanted[..., 1:][..., allowed], atol=1e-6)


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("k", [0, 1, 2, 4])
def test_acceptance_6_gates_are_not_renormalised(k, renormalise):
    p, x = leaves_of(3), inputs()
    wanted, _ = oracle(p, x, k, renormalise)
    decision = route(p, x, top_k=k, renormalise=renormalise)
    np.testing.assert_allclose(decision.gates, wanted[..., 1:], atol=1e-6)
    np.testing.assert_allclose(decision.base_gate, wanted[..., 0], atol=1e-6)
    total = np.asarray(decision.gates.sum(-1) + decision.base_gate)
    if k in (0, 4) or renormalise:
        np.testing.assert_allclose(total, 1.0, atol=1e-6)
    else:
        assert (total < 1).all() and total.min() > 0
    assert int(decision.selected.sum(-1).max()) <= decision.k_max


def test_acceptance_7_a_bias_above_zero_is_none_and_has_no_gradient():
    p, x = leaves_of(3), inputs()
    at = lambda beta: route(p | {"beta": jnp.asarray(beta, jnp.float32)}, x)  # noqa: E731
    np.testing.assert_array_equal(at([0.5, 0.0, 2.0]).logits, at([0.0, 0.0, 0.0]).logits)
    lower = at([0.0, -0.7, 0.0])
    np.testing.assert_allclose(lower.logits[..., 1], at([0.0] * 3).logits[..., 1] - 0.7, atol=1e-6)
    assert (lower.gates[..., 1] < at([0.0] * 3).gates[..., 1]).all()
    first = lambda beta: route(p | {"beta": beta}, x).gates[..., 0].sum()  # noqa: E731
    slope = jax.jit(jax.grad(first))(jnp.array([0.5, 0.0, -1.0]))
    assert slope[0] == 0 and slope[1] < 0 and slope[2] < 0, "at 0 it can still fall"
    site = Site("ffn", D, D, (0,), 3)
    assert set(ROUTER(bias=False).init_leaves(jax.random.key(0), site, 0)) == {"W", "r0"}
    assert (ROUTER().init_leaves(jax.random.key(0), site, 0)["beta"] == 0).all()


def test_acceptance_8_z_loss_counts_the_base_too():
    p, x = leaves_of(3, scale=0.5), inputs()
    z = oracle(p, x)[1]
    wanted = 1e-3 * np.mean(np.log(np.exp(z).sum(-1)) ** 2)
    member = LOSSES["z_loss"]()
    assert member.weight == 1e-3
    value = member.weight * small.loss_value(member, route(p, x), small.context(2, 6))
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    plain = Routing(*(jnp.zeros((2, 6, 3)) for _ in range(4)), jnp.ones((2, 6), bool))
    np.testing.assert_allclose(member.stats(plain, small.context(2, 6))["z"] / 12, np.log(3) ** 2, rtol=1e-6)


# ---- beside the list -------------------------------------------------------------------------------------------------


def test_the_block_is_the_papers_sum_of_whole_ffns():
    """Float64: top 2 of 4, not renormalised, so the block is shrunk as published."""
    model, params, adapters, _ = build(3, **{f"{RULE}router__renormalise": False, f"{RULE}router__top_k": 2})
    data = small.batch()
    keep = data["segment_ids"] > 0
    wanted, decisions = reference.forward(np, model, *map(reference.as_float64, (params, adapters)), data)
    np.testing.assert_allclose(hidden(model, params, adapters, data)[keep], wanted[keep], atol=2e-5)
    d = decisions[0, "ffn", "ffn"]
    assert (d.gates.sum(-1) + d.base_gate)[keep].max() < 1


def test_rows_are_plain_means_and_another_width_goes_through_one_matrix():
    rng = np.random.default_rng(0)
    means = {name: rng.standard_normal(8) for name in ("a", "b", "public", "c", "d")}
    W, r0 = ROUTER(public="public", scale=3.0).rows(means, 2, 8, "router")
    np.testing.assert_allclose(
        W, 3 * np.stack([(means["a"] + means["c"]) / 2, (means["b"] + means["d"]) / 2]), rtol=1e-6
    )
    np.testing.assert_allclose(r0, 3 * means["public"][None], rtol=1e-6)
    wide, wide0 = ROUTER(public="public").rows(means, 2, 4000, "router")
    again, _ = ROUTER(public="public").rows(means, 4, 4000, "router")
    alone, _ = ROUTER(public="public").rows({"a": means["a"], "public": means["public"]}, 1, 4000, "router")
    np.testing.assert_allclose(again[0], alone[0], rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(wide0), np.linalg.norm(r0) / 3, rtol=0.1)
    np.testing.assert_allclose(ROUTER().rows(means, 5, 8, "router")[1][0], np.mean(list(means.values()), 0), rtol=1e-6)
    with pytest.raises(InputError, match="router.public: got 'news'"):
        ROUTER(public="news").rows(means, 2, 8, "router")
    with pytest.raises(InputError, match="documents for every expert"):
        ROUTER(public="public").rows(means, 5, 8, "router")


def test_plain_runs_are_joined_by_documents_and_one_is_left_out(owners, tmp_path):
    """Through the commands' own functions: LoRA runs, rows of documents, a run that trains nothing, `eval.without`."""
    folder = owners["legal"].parent
    for name in ("legal", "code"):
        config = config_of(folder, (name,), steps=1)
        with config.unlocked():
            config.method.rules = dict(all=common.rule("gate,up", adapter=common.adapter(rank=2, alpha=4.0)))
            config.losses, config.schedule.s00.route = {}, ""
        train(config, str(tmp_path / name), note=lambda text: None)
    load = tuple(str(tmp_path / name) for name in ("legal", "code"))
    config = config_of(folder, ("legal", "code"), steps=1, load=load, documents=DOCUMENTS)
    said = []
    train(config, str(tmp_path / "joined"), note=said.append)
    assert any("documents: 15 of 3 tasks" in line for line in said)
    run = load_run(tmp_path / "joined")
    own = jax.device_get(run.adapters)["ffn"]["000-003"]
    wanted = np.stack([embedding_of(folder, name, name) for name in ("legal", "code")])
    np.testing.assert_array_equal(own["router"]["ffn"]["W"], wanted[None].repeat(4, 0))
    assert (own["down"]["B"] == 0).all() and np.abs(own["gate"]["A"][:, :, :2]).min() > 0
    text = "Article 3"
    small_run = load_run(tmp_path / "joined", without="code")
    assert small_run.model.rules[0].experts == (1,) * 4 and small_run.config.method.rules.ffn.load == load[:1]
    for keep_data in (True, False):  # as launch.evaluate and launch.generate open it: without its files
        config = without_inputs(read_config(tmp_path / "joined"), keep_data=keep_data)
        with config.unlocked():
            config.eval.without = "code"
        flagged = load_run(tmp_path / "joined", config=config)
        np.testing.assert_array_equal(flagged.logits(text), small_run.logits(text))
    assert np.abs(flagged.logits(text) - run.logits(text)).max() > 0
    assert load_run(tmp_path / "joined", without="code,legal").model.rules == ()
    with pytest.raises(InputError, match="eval.without: got 'kode'; expected experts among legal, code. Did you mean"):
        load_run(tmp_path / "joined", without="kode")
    mixed = config_of(folder, ("legal", "code"), steps=1, load=(load[0], str(owners["code"])), documents=DOCUMENTS)
    with pytest.raises(InputError, match="runs that all have it"):
        train(mixed, str(tmp_path / "mixed"), note=said.append)
    both = config_of(folder, ("legal", "code"), load=tuple(map(str, owners.values())), documents=DOCUMENTS)
    with pytest.raises(InputError, match="router.documents: got '?5"):
        train(both, str(tmp_path / "both"), note=said.append)


ANY = {
    "softmax_topk": dict(router=dict(name="softmax_topk", k=3)),
    "sigmoid_topk": dict(router=dict(name="sigmoid_topk", k=2, bias_rate=1e-3)),
    "x_lora": dict(router=dict(name="x_lora", depth=2, width=8)),
    "goat": dict(router=dict(name="softmax_topk", k=2), adapter=dict(name="lora", init=dict(name="goat"))),
}


@pytest.mark.parametrize("name", ANY)
def test_experts_of_other_routers_are_left_out_by_number_or_refused(name):
    options = dict(ANY[name])
    adapter = common.adapter(**(dict(rank=2, alpha=4.0, dropout=0.0) | options.pop("adapter", {})))
    rules = lambda E: dict(mix=common.rule("q,down", experts=E, adapter=adapter, **options))  # noqa: E731
    model, params, adapters = helpers.build(rules("4"))
    adapters, data, state = helpers.randomised(adapters), helpers.batch(), model.init_router_state()
    config = helpers.rules_config(rules("4"))
    with config.unlocked():
        config.eval.without = "2"
    items = jax.device_get({"adapters": adapters, "router_state": state})
    if name == "goat":
        with pytest.raises(InputError, match=r"eval.without: got .*A0, of shape"):
            leave_out(config, model, params, items)
        return
    told, smaller, left = leave_out(config, model, params, items)
    built = helpers.build(told.method.rules.to_dict())[0]
    assert built.rules == smaller.rules and told.eval.without == ""
    masked = helpers.hidden(model, params, adapters, data | {"allowed": np.arange(4) != 2}, state)
    got = helpers.hidden(built, params, left["adapters"], data, left["router_state"])
    keep = data["segment_ids"] > 0
    np.testing.assert_allclose(np.asarray(got)[keep], np.asarray(masked)[keep], atol=2e-5)


def test_layers_of_other_counts_have_no_names():
    rules = dict(
        mix=common.rule("q", experts="1|2|3", adapter=common.adapter(rank=2), router=dict(name="softmax_topk", k=1))
    )
    model, params, adapters = helpers.build(rules)
    config = helpers.rules_config(rules)
    with config.unlocked():
        config.eval.without = "0"
    with pytest.raises(InputError, match="different numbers of experts"):
        leave_out(config, model, params, {"adapters": adapters, "router_state": {}})


def test_a_loss_of_two_halves_is_refused_apart():
    rules = dict(
        mix=common.rule("q", experts="2", adapter=common.adapter(rank=2), router=dict(name="softmax_topk", k=1))
    )
    model, params, adapters = helpers.build(rules, dict(localized_balance=dict(world="factbook")))
    with pytest.raises(InputError, match="'apart' beside the loss localized_balance"):
        helpers.hidden(dataclasses.replace(model, route="apart"), params, adapters, helpers.batch())
