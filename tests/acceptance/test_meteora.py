"""MeteoRA: the acceptance list of its specification, item by item (the numbers are the list's)."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from configs import meteora
from kernels_pallas import grouped_lora, rank_gated
from molora_jax.backbones.compile import compile_model
from molora_jax.backbones.families import TINY
from molora_jax.core import trees
from molora_jax.core.routing import slots
from molora_jax.decode import generate as decoding
from molora_jax.errors import InputError
from molora_jax.io.base import load_base
from molora_jax.losses.task_label import TaskLabel
from molora_jax.regimes.stages import stages
from molora_jax.routers import ROUTERS
from molora_jax.runs.expert_runs import load_experts
from molora_jax.training.step import loss_sums
from tests.acceptance import small
from tests.battery.cases import Case, fresh_adapters, method
from tests.surgery.make import lora_rules, new_run

ROUTER = ROUTERS["labelled_topk"]
E, D, T = 5, 16, 40
RULE = "method__rules__all__"
FEW = {f"{RULE}sites": "q,down", f"{RULE}experts": "4"}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def single(x):
    return jnp.asarray(x, jnp.float32)


def decide(W, x, train=False, **options):
    """`(gates, selected)` of tokens `x [T, D]`."""
    ctx = small.context(1, len(x), train=train)
    made = small.routed(ROUTER(**options), {"W": single(W)}, {}, single(x)[None], ctx)[0]
    return np.asarray(made.gates[0]), np.asarray(made.selected[0])


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.fixture(scope="module")
def whole():
    """All seven projections of two layers, three adapters: `(model, params, adapters, state)`."""
    return small.build("meteora", **{f"{RULE}experts": "3"})


def merged(params, own, i, scale, sites):
    """The base with adapter i added to every weight, in float64."""
    blocks = dict(params["blocks"])
    for site in sites:
        A, B = (np.asarray(own[site][name][:, i], np.float64) for name in "AB")
        W = np.asarray(params["blocks"][site]["kernel"], np.float64) + scale * np.einsum("lrd,lro->ldo", A, B)
        blocks[site] = params["blocks"][site] | {"kernel": single(W)}
    return params | {"blocks": blocks}


@functools.partial(jax.jit, static_argnums=0)
def hidden(model, params, adapters, data):
    return model.hidden(params, adapters, {}, data)[0]


@pytest.mark.parametrize("i", range(3))
def test_acceptance_1_gates_forced_to_one_adapter_are_that_lora_in_all_layers(whole, i):
    model, params, adapters, _ = whole
    data = small.batch()
    keep = data["segment_ids"] > 0
    got = hidden(model, params, adapters, data | {"allowed": jnp.arange(3) == i})
    own = adapters["all"]["000-001"]
    wanted = hidden(model.without_rules(), merged(params, own, i, 16 / 8, model.config.sites), {}, data)
    np.testing.assert_allclose(np.asarray(got)[keep], np.asarray(wanted)[keep], atol=2e-5)
    assert np.abs(np.asarray(got) - hidden(model.without_rules(), params, {}, data))[keep].max() > 0.1


def test_acceptance_2_softmax_topk_renormalised_is_topk_softmax():
    W, x = normal(E, D) / 4, normal(T, D, seed=1)
    z = x @ W.T
    top = np.argsort(np.argsort(-z, axis=-1), axis=-1) < 2
    whole_ = np.where(top, softmax(z), 0)  # the published loop: softmax over all, the top 2, renormalised
    for train in (True, False):
        gates, selected = decide(W, x, train)
        np.testing.assert_array_equal(selected, top)
        np.testing.assert_allclose(gates, whole_ / whole_.sum(-1, keepdims=True), atol=1e-6)


def test_acceptance_2_temperature_evens_the_two_in_use_and_only_there():
    W, x = normal(E, D) / 4, normal(T, D, seed=1)
    z, one = x @ W.T, decide(W, x)[0]
    for temperature in (15.0, 0.5):
        gates, selected = decide(W, x, temperature=temperature)
        np.testing.assert_array_equal(selected, one > 0, err_msg="the order does not depend on it")
        kept = np.where(selected, softmax(z / temperature), 0)  # once: of the logits
        np.testing.assert_allclose(gates, kept / kept.sum(-1, keepdims=True), atol=1e-6)
        np.testing.assert_array_equal(decide(W, x, True, temperature=temperature)[0], decide(W, x, True)[0])
    even, selected = decide(W, x, temperature=1e7)
    np.testing.assert_allclose(even[selected], 0.5, atol=1e-6)
    three, selected = decide(W, x, k=3, temperature=1e7)
    np.testing.assert_allclose(three[selected], 1 / 3, atol=1e-6)


def test_acceptance_2_one_adapter_a_token_has_weight_exactly_one():
    for W in (normal(E, D), 30 * normal(E, D)):
        gates, selected = decide(W, normal(T, D, seed=1), k=1, temperature=20.0)
        assert (selected.sum(-1) == 1).all()
        np.testing.assert_array_equal(gates, selected.astype(np.float32))


def test_acceptance_3_loop_batched_and_grouped_products_agree_forward_and_backward():
    """The published loop over adapters and its gather by index, written here; ours with all experts, and by groups."""
    E, R, K, out = 6, 4, 2, 24
    A, B, x, probe = normal(E, R, D) / 4, normal(E, R, out, seed=1) / 2, normal(T, D, seed=2), normal(T, out, seed=3)
    W = normal(E, D, seed=4) / 4

    def chosen(W, x):
        ctx = small.context(1, T)
        idx, g = slots(ROUTER(k=K).route({"W": W}, {}, x[None], ctx)[0])
        return idx, g, jnp.zeros((T, E)).at[jnp.arange(T)[:, None], idx].set(g)

    def loop(A, B, W, x):
        g = chosen(W, x)[2]
        return sum(g[:, e : e + 1] * ((x @ A[e].T) @ B[e]) for e in range(E))

    def batched(A, B, W, x):
        idx, g, _ = chosen(W, x)
        z = jnp.einsum("td,tkrd->tkr", x, A[idx])
        return jnp.einsum("tk,tkr,tkro->to", g, z, B[idx])

    def dense(A, B, W, x):
        return rank_gated(x, A, B, chosen(W, x)[2])

    def grouped(A, B, W, x):
        return grouped_lora(x, A, B, *chosen(W, x)[:2])

    found = {}
    for form in (loop, batched, dense, grouped):
        of = jax.jit(jax.value_and_grad(lambda *at, form=form: jnp.sum(single(probe) * form(*at)), (0, 1, 2, 3)))
        found[form.__name__] = jax.device_get(of(*map(single, (A, B, W, x))))
    z = x @ W.T
    top = np.argsort(np.argsort(-z, axis=-1), axis=-1) < K
    g = np.where(top, softmax(z), 0)
    g = g / g.sum(-1, keepdims=True)
    y = sum(g[:, e : e + 1] * (x @ A[e].T @ B[e]) for e in range(E))  # float64, from the paper
    for name, (value, slopes) in found.items():
        np.testing.assert_allclose(value, np.sum(probe * y), rtol=1e-4, err_msg=name)
        for got, wanted in zip(slopes, found["loop"][1], strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4, err_msg=name)
    assert all(np.abs(slope).max() > 0.1 for slope in found["loop"][1])


# ---- the loss ------------------------------------------------------------------------------------------------------


def value(z, task_ids, valid=None, segment_ids=None, loss=None, tasks=(), **changes):
    """Of gates `z [G, B, S, E]`, as G layers of one router."""
    shape, loss = z.shape[1:3], loss or TaskLabel()
    ids = jnp.ones(shape, jnp.int32) if segment_ids is None else jnp.asarray(segment_ids)
    there = ids > 0 if valid is None else jnp.asarray(valid)
    ctx = small.context(*shape, task_ids=jnp.asarray(task_ids), segment_ids=ids, valid=there, tasks=tasks, **changes)
    return float(_value(loss, single(z), there, ctx))


@functools.partial(jax.jit, static_argnums=0)
def _value(loss, z, there, ctx):
    sums = [loss.stats(types.SimpleNamespace(logits=one, valid=there), ctx) for one in z]
    return loss.value({"all": {"000-001": {"q": jax.tree.map(lambda *x: jnp.stack(x), *sums)}}})


def test_acceptance_4_uniform_logits_give_log_E_and_right_gates_give_zero():
    tasks = np.arange(12).reshape(2, 6) % 28
    assert value(np.zeros((3, 2, 6, 28)), tasks) == pytest.approx(np.log(28), abs=1e-6)
    assert np.log(28) == pytest.approx(3.332, abs=1e-3)
    right = 100.0 * np.eye(28)[tasks]
    assert value(np.stack([right] * 3), tasks) == 0.0
    assert value(np.stack([right, -right]), tasks) > 40


def test_acceptance_4_every_gate_and_token_weighs_alike_and_padding_nothing():
    z, rng = normal(3, 2, 6, E), np.random.default_rng(1)
    tasks, valid = rng.integers(0, E, (2, 6)), rng.random((2, 6)) < 0.7
    log_p = np.log(softmax(z))
    each = -np.take_along_axis(log_p, np.broadcast_to(tasks, (3, 2, 6))[..., None], -1)[..., 0]
    wanted = np.concatenate([one[valid] for one in each]).mean()  # 7 L gates beside each other, one mean
    assert value(z, tasks, valid) == pytest.approx(wanted, rel=1e-5)
    spoilt = np.where(valid[None, ..., None], z, 1e6)
    assert value(spoilt, tasks, valid) == pytest.approx(wanted, rel=1e-5)
    assert value(z, tasks, np.zeros((2, 6), bool)) == 0.0
    # routers with and without the token in their sums: one mean over all, not a mean of means
    loss, made = TaskLabel(), {}
    for name, count in (("q", 6), ("down", 2)):
        there = np.arange(6)[None] < np.full((2, 1), count)
        ctx = small.context(2, 6, task_ids=jnp.asarray(tasks), valid=jnp.asarray(there))
        decision = types.SimpleNamespace(logits=single(z[0]), valid=ctx.valid)
        made[name] = jax.tree.map(lambda v: v[None], loss.stats(decision, ctx))
    got = loss.value({"all": {"000-000": made}})
    assert float(got) == pytest.approx(np.concatenate([each[0].ravel(), each[0][:, :2].ravel()]).mean(), rel=1e-5)


def test_acceptance_4_labels_of_packed_rows_are_those_of_each_example_alone():
    """Published: z at t against the label at t + 1, of one example a row. Here: two examples and padding in a row."""
    lengths, tasks = (4, 3), (2, 0)
    rng = np.random.default_rng(3)
    rows = [rng.standard_normal((n, E)) for n in lengths]  # an example of n tokens has n - 1 inputs
    alone = []
    for z, task in zip(rows, tasks, strict=True):
        labels = np.full(len(z), task)
        alone.append(-np.log(softmax(z[:-1]))[np.arange(len(z) - 1), labels[1:]])
    packed = np.concatenate([*(z[:-1] for z in rows), np.zeros((2, E))])[None, None]
    ids, ours = np.array([[1, 1, 1, 2, 2, 0, 0]]), np.array([[2, 2, 2, 0, 0, 4, 4]])
    assert value(packed, ours, segment_ids=ids) == pytest.approx(np.concatenate(alone).mean(), rel=1e-5)


def test_acceptance_4_named_tasks_have_the_experts_in_their_order_and_others_no_label():
    names, z = ("code", "math", "emoji"), normal(1, 1, 6, E)
    at = np.array([[0, 1, 2, 0, 1, 2]])
    log_p = np.log(softmax(z[0, 0]))
    loss = TaskLabel(tasks="emoji,code")  # expert 0 is emoji's, 1 is code's; math has none
    wanted = -np.mean([log_p[0, 1], log_p[2, 0], log_p[3, 1], log_p[5, 0]])
    assert value(z, at, loss=loss, tasks=names) == pytest.approx(wanted, rel=1e-5)
    plain = -log_p[np.arange(6), at[0]].mean()
    assert value(z, at, tasks=names) == pytest.approx(plain, rel=1e-5)
    assert value(z, at, tasks=names, route="task") == 0.0, "a stage that routes by task teaches nothing"
    shut = dict(allowed=jnp.arange(E) != 1)
    kept = np.delete(z[0, 0], 1, axis=-1)  # a shut-out expert has no probability, and a label no token
    wanted = -np.mean([np.log(softmax(kept))[t, {0: 0, 2: 1}[at[0, t]]] for t in (0, 2, 3, 5)])
    assert value(z, at, tasks=names, **shut) == pytest.approx(wanted, rel=1e-5)
    with pytest.raises(InputError, match=r"losses.task_label.tasks: got 3 tasks; expected at most 2"):
        value(z[..., :2], at, loss=TaskLabel(tasks="emoji,code,math"), tasks=names)


# ---- training ------------------------------------------------------------------------------------------------------


def test_acceptance_5_gates_alone_train_and_adapters_and_base_keep_their_bits():
    config = method("meteora", **{"method.rules.all.sites": "q,down", "method.rules.all.experts": "4"})
    gate_stage = stages(config)[-1]
    case = Case(config, freeze=gate_stage.freeze)
    state = case.start()
    before, base = flatten_dict(jax.device_get(state.adapters), sep="/"), jax.device_get(case.params)
    for _ in range(2):
        state, metrics, gradients = case.run(state)
    after = flatten_dict(jax.device_get(state.adapters), sep="/")
    assert {path.rpartition("/")[2] for path in gradients} == {"W"}
    for path, leaf in after.items():
        assert np.array_equal(leaf, before[path]) != path.endswith("/W"), path
    jax.tree.map(np.testing.assert_array_equal, base, jax.device_get(case.params))
    assert np.isfinite(metrics["aux/task_label"])


@functools.partial(jax.jit, static_argnums=0)
def gate_gradient(model, params, adapters, data):
    """Of the gate loss alone."""

    def loss(adapters):
        stats = model.hidden(params, adapters, {}, data)[1]
        return TaskLabel().value(loss_sums(stats, "task_label"))

    return jax.grad(loss)(adapters)


@pytest.mark.parametrize("k", [2, 1])
def test_acceptance_5_gates_learn_from_both_losses_and_with_one_adapter_from_their_own(k):
    model, params, adapters, state = small.build("meteora", **FEW, **{f"{RULE}router__k": k})
    data = small.batch()
    of = lambda tree: [np.abs(x).max() for p, x in flatten_dict(tree).items() if p[-1] == "W"]  # noqa: E731
    from_lm, from_labels = (
        of(small.lm_gradient(model, params, adapters, state, data)), of(gate_gradient(model, params, adapters, data))
    )  # fmt: skip
    assert len(from_lm) == len(from_labels) == 2 and min(from_labels) > 1e-3
    assert max(from_lm) == 0.0 if k == 1 else min(from_lm) > 1e-6


def test_acceptance_5_loaded_adapters_are_frozen_and_the_scripts_form_trains_them_too(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    load = tuple(str(tmp_path / name) for name in ("a", "b"))
    for adapters, trained in (("frozen", {"W"}), ("trained", {"W", "A", "B"})):
        config = meteora.get_config(load=load, tasks="code,math", adapters=adapters)
        assert len(stages(config)) == 1 and config.method.rules["all"].experts == "2"
        model = compile_model(config, small.DECODER)
        shapes = jax.eval_shape(model.init_adapters, jax.random.key(0), small.base(small.DECODER))
        moving = trees.split(shapes, model.frozen_patterns() + stages(config)[0].freeze)[0]
        assert {path[-1] for path in flatten_dict(moving)} == trained
    fresh = stages(meteora.get_config())
    assert [(s.route, s.freeze) for s in fresh] == [("task", ("*/router/*",)), ("", ("*/A", "*/B"))]


def test_acceptance_6_one_more_adapter_changes_nothing_while_its_gate_loses():
    R, out = 3, 24
    x = normal(T, D)
    x[:, 0] = 1.0  # a direction by which the new gate loses everywhere, or wins
    W, A, B = normal(E, D, seed=1) / 4, normal(E, R, D, seed=2), normal(E, R, out, seed=3)
    lora = small.lora(R, 6.0)

    def change(W, A, B):
        gates = single(decide(W, x)[0])
        return np.asarray(small.change(lora, {"A": single(A), "B": single(B)}, gates, single(x)))

    old = change(W, A, B)
    more = [np.concatenate([leaf, normal(1, *leaf.shape[1:], seed=9)]) for leaf in (A, B)]
    loses, wins = (np.concatenate([W, sign * 50.0 * np.eye(D)[:1]]) for sign in (-1, 1))
    np.testing.assert_allclose(change(loses, *more), old, rtol=1e-5, atol=1e-5)
    assert np.abs(change(wins, *more) - old).max() > 0.1


def test_acceptance_7_runs_of_other_ranks_and_scales_are_padded_and_say_the_same(tmp_path):
    runs = {"a": dict(rank=2, alpha=8.0, sites="q,down"), "b": dict(rank=4, alpha=3.0, sites="q")}
    for seed, (name, rule) in enumerate(runs.items()):
        new_run(tmp_path / name, lora_rules(**rule), seed=seed, scale=0.2)
    base = load_base("random:tiny")
    config = small.config(
        "meteora",
        **{f"{RULE}sites": "q,down", f"{RULE}experts": "2", f"{RULE}load": tuple(str(tmp_path / n) for n in runs)},
    )
    model = compile_model(config, base.config, max_segments=2)
    params = jax.device_put(base.params)
    fresh = fresh_adapters(model, jax.random.key(0), params)
    adapters = load_experts(model, jax.device_get(fresh), {"digest": base.digest})
    own = adapters["all"][f"000-{TINY.layers - 1:03d}"]
    assert not own["q"]["A"][:, 0, 2:].any() and not own["q"]["A"][:, 1, 4:].any() and not own["down"]["B"][:, 1].any()
    data = small.batch()
    keep = data["segment_ids"] > 0
    from molora_jax.runs.warm_start import load_adapters

    for i, (name, rule) in enumerate(runs.items()):
        leaves = load_adapters(str(tmp_path / name))["all"][f"000-{TINY.layers - 1:03d}"]
        one = merged(params, leaves, 0, rule["alpha"] / rule["rank"], rule["sites"].split(","))
        wanted = np.asarray(hidden(model.without_rules(), one, {}, data))[keep]
        got = np.asarray(hidden(model, params, adapters, data | {"allowed": jnp.arange(2) == i}))[keep]
        np.testing.assert_allclose(got, wanted, atol=2e-5)
    assert np.abs(wanted - np.asarray(hidden(model.without_rules(), params, {}, data))[keep]).max() > 1e-2


def test_one_generation_changes_adapters_and_a_cache_changes_nothing(whole):
    """Gates are each token's own, so an answer goes from one adapter to another on its way."""
    model, params, adapters, state = whole
    prompts = [[5, 6, 7], [9, 11], [20, 3, 41, 40]]
    answers = [
        decoding.generate(model, params, adapters, state, prompts, max_new_tokens=8, eos_id=None, cache=cache)
        for cache in (True, False)
    ]
    assert answers[0] == answers[1]
    for prompt, answer in zip(prompts, answers[0], strict=True):
        text = np.array([prompt + answer], np.int32)
        data = dict(tokens=text, segment_ids=np.ones_like(text), positions=np.arange(text.shape[1])[None])
        gates = jax.device_get(small.gates(model, params, adapters, state, data))["all"]["000-001"]
        strongest = np.stack([gates[site][:, 0].argmax(-1) for site in model.config.sites])[..., len(prompt) :]
        assert (strongest != strongest[..., :1]).any(), "within the answer another adapter is the strongest"


def test_a_start_of_unit_size_is_nearly_one_hot_and_the_others_are_even():
    site = types.SimpleNamespace(experts=28, d_in=576)
    x = normal(200, 576)
    sizes = {}
    for init in ("unit", "normal", "kaiming"):
        W = ROUTER(init=init).init_leaves(jax.random.key(0), site, 0)["W"]
        sizes[init] = np.std(x @ np.asarray(W).T)
    assert sizes["unit"] == pytest.approx(576**0.5, rel=0.05)
    assert sizes["kaiming"] == pytest.approx(3**-0.5, rel=0.05) and sizes["normal"] == pytest.approx(0.48, rel=0.05)


def test_tasks_of_the_loss_are_checked_before_anything_compiles():
    with pytest.raises(InputError, match=r"losses.task_label.tasks: got 'cod'"):
        small.config("meteora", losses__task_label__tasks="cod,math")
    with pytest.raises(InputError, match=r"router.temperature"):
        small.config("meteora", **{f"{RULE}router__temperature": 0.0})
    one = dataclasses.replace(ROUTER(), k=9)
    assert one.k_max(3) == 3
