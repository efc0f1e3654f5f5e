"""MoRA for continual learning: the acceptance list of its specification, item by item (the numbers are the list's)."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from configs import common
from molora_jax import config as schema
from molora_jax.core import lowrank, turns
from molora_jax.core.rules import Rule
from molora_jax.errors import InputError
from molora_jax.regimes.continual import next_task
from molora_jax.routers import ROUTERS
from molora_jax.sharding import make_mesh
from tests.acceptance import small
from tests.battery.cases import Case, method, random_adapters
from tests.battery.checks import same_step
from tests.regimes import small as runs

ROUTER = ROUTERS["self_activated"]
T, D, OUT, r, TASKS = 11, 16, 12, 4, 3
E = r * TASKS
LORA = small.lora(1, 1.0)
RULE = "method__rules__all__"


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def single(x):
    return jnp.asarray(x, jnp.float32)


A, B, X = normal(E, D) / 4, normal(E, OUT, seed=1), normal(T, D, seed=2)


def router(**options):
    return ROUTER(**dict(k=r, temperature=0.03, prune=-1.0, per_task=r) | options)


def decide(made, A, x, tasks=TASKS, train=False, **changes):
    ctx = small.context(1, len(x), state={"tasks": jnp.int32(tasks)}, train=train, **changes)
    z = made.input_of(single(x)[None], {"A": single(A)[:, None]}, ctx)
    return small.routed(made, {}, {}, z, ctx)[0]


def change(made, A, B, x, tasks=TASKS, train=False):
    """What the experts add to W x, as the model does: traceable in A, B and x."""
    rule = Rule("all", ("q",), (len(A),), LORA, made)
    state = {"router": {"q": {"tasks": jnp.int32(tasks)}}}
    leaves = {"q": {"A": single(A)[:, None], "B": single(B)[:, None]}}
    own = turns.held(rule, len(A), leaves, state)["q"]
    return small.change(LORA, own, decide(made, own["A"][:, 0], x, tasks, train).gates[0], single(x))


def by_hand(A, B, x, k=r, tau=0.03, delta=-1.0):
    """`(y, w)` in float64, of the experts that are there."""
    z = x @ A.T
    s = z / np.sqrt((z**2).sum(-1, keepdims=True))
    kept = np.argsort(np.argsort(-s, axis=-1), axis=-1) < k
    e = np.where(kept, np.exp((s - s.max(-1, keepdims=True)) / tau), 0)
    w = e / e.sum(-1, keepdims=True)
    w = np.where(s < delta, 0, w)
    return (w * z) @ B, w


def test_the_product_is_the_papers_with_signed_scores_and_no_renormalising_after_the_threshold():
    for options in (dict(), dict(k=2), dict(tau=0.5), dict(delta=0.4), dict(tau=0.5, delta=0.3)):
        y, w = by_hand(A, B, X, **options)
        names = dict(k="k", tau="temperature", delta="prune")
        made = router(**{names[name]: value for name, value in options.items()})
        np.testing.assert_allclose(decide(made, A, X).gates[0], w, atol=1e-5)
        np.testing.assert_allclose(change(made, A, B, X), y, rtol=1e-4, atol=1e-5)
    assert ((w.sum(-1) < 0.99) & (w.sum(-1) > 0)).any(), "what the threshold takes is not given to the others"


@pytest.mark.parametrize("c", [1e-2, 3.0, 500.0])
def test_acceptance_1_weights_do_not_change_with_the_size_of_x_and_the_change_grows_with_it(c):
    made = router(temperature=0.3, prune=0.1)
    one, scaled = decide(made, A, X), decide(made, A, c * X)
    np.testing.assert_allclose(scaled.gates, one.gates, atol=2e-5)
    np.testing.assert_array_equal(scaled.selected, one.selected)
    y = np.asarray(change(made, A, B, X))
    np.testing.assert_allclose(change(made, A, B, c * X), c * y, rtol=1e-3, atol=1e-4 * c)


def test_acceptance_2_all_ranks_and_a_hot_softmax_are_the_mean_of_all():
    made = router(k=E, temperature=1e6)
    np.testing.assert_allclose(decide(made, A, X).gates, 1 / E, atol=1e-6)
    np.testing.assert_allclose(change(made, A, B, X), X @ A.T @ B / E, rtol=1e-4, atol=1e-5)


def test_acceptance_3_a_cold_softmax_is_the_largest_signed_score():
    z = X @ A.T
    below = z - z.max(-1, keepdims=True) - 0.1 * np.abs(z).max(-1, keepdims=True)  # keys that say no to everything
    for keys, x, scores in ((A, X, z), (np.eye(E), below, below)):
        gates = np.asarray(decide(router(temperature=1e-5), keys, x).gates[0])
        np.testing.assert_allclose(gates, np.eye(E)[scores.argmax(-1)], atol=1e-6)
    assert (below < 0).all() and (np.abs(below).argmax(-1) != below.argmax(-1)).all(), "the least negative, not |z|"


FEW = {f"{RULE}sites": "q,down", f"{RULE}experts": str(E), f"{RULE}router__per_task": r, f"{RULE}router__k": r}


@pytest.fixture(scope="module")
def built():
    """Two sites of two layers, three tasks of four experts: `(model, params, adapters, state of task 1)`."""
    return small.build("mora_cl", **FEW)


def of_task(state, n):
    return jax.tree.map(lambda tasks: jnp.full_like(tasks, n), state)


@functools.partial(jax.jit, static_argnums=(0, 4))
def hidden(model, params, adapters, state, train):
    return model.hidden(params, adapters, state, small.batch(), train=train)[0]


def test_acceptance_4_a_threshold_above_one_is_the_base_and_training_knows_none(built):
    model, params, adapters, state = built
    state, keep = of_task(state, 2), small.batch()["segment_ids"] > 0
    never = small.build("mora_cl", **FEW, **{f"{RULE}router__prune": 1.01})[0]
    base = np.asarray(hidden(model.without_rules(), params, {}, {}, False))[keep]
    np.testing.assert_allclose(np.asarray(hidden(never, params, adapters, state, False))[keep], base, atol=1e-6)
    assert np.abs(np.asarray(hidden(model, params, adapters, state, False))[keep] - base).max() > 1e-2
    both = [np.asarray(hidden(made, params, adapters, state, True)) for made in (model, never)]
    np.testing.assert_array_equal(*both)
    gates = small.gates(never, params, adapters, state, small.batch())["all"]["000-001"]
    assert not np.asarray(gates["q"]).any(), "some tokens may get no update at all: here none does"


def leaves_of(adapters, name):
    """`{site: [L, E, ...]}`"""
    return {site: np.asarray(own[name]) for site, own in adapters["all"]["000-001"].items()}


def gradient(built, adapters, task):
    model, params, _, state = built
    return small.lm_gradient(model, params, adapters, of_task(state, task), small.batch())


def untaught(adapters, task):
    """`adapters` as a task begins: B = 0 from its experts on."""
    flat = flatten_dict(adapters, sep="/")
    fresh = lambda p, x: np.where(np.arange(E)[:, None, None] < r * (task - 1), x, 0)  # noqa: E731
    return unflatten_dict({p: fresh(p, x) if p.endswith("/B") else x for p, x in flat.items()}, sep="/")


@pytest.mark.parametrize("task", [1, 2, 3])
def test_acceptance_5_the_bank_and_what_is_closed_get_no_gradient(built, task):
    slopes = gradient(built, built[2], task)
    for name in "AB":
        for site, g in leaves_of(slopes, name).items():
            size = np.abs(g).max(axis=(0, 2, 3))
            own = np.arange(E) // r == task - 1
            assert (size[~own] == 0).all() and (size[own] > 0).all(), (name, site)


def test_acceptance_5_keys_have_no_gradient_in_the_first_task_and_one_in_the_next_though_b_is_zero(built):
    _, _, adapters, _ = built
    for task in (1, 2):
        fresh = untaught(adapters, task)
        keys = leaves_of(gradient(built, fresh, task), "A")
        own = np.arange(E) // r == task - 1
        for site, g in keys.items():
            size = np.abs(g).max(axis=(0, 2, 3))
            assert (size[own] > 1e-6).any() if task == 2 else not size.any(), site


def test_acceptance_5_a_new_key_outside_the_top_k_learns_through_the_norm_and_its_value_not_at_all():
    """Against slopes of the formula by finite differences in float64."""
    made, probe, x = router(k=2), normal(1, OUT, seed=5), X[:1]
    keys = np.where(np.arange(E)[:, None] < r, A + 0.5 * x, A)  # old ones take both places
    kept = by_hand(keys[: 2 * r], B[: 2 * r], x, k=2)[1][0] > 0
    assert kept[:r].sum() == 2 and not kept[r:].any()
    of = lambda keys, B: jnp.sum(single(probe) * change(made, keys, B, x, tasks=2, train=True))  # noqa: E731
    by_key, by_value = jax.jit(jax.grad(of, (0, 1)))(single(keys), single(B))
    assert not np.asarray(by_value).any() and not np.asarray(by_key)[:r].any() and not np.asarray(by_key)[2 * r :].any()
    wanted, step = np.zeros((r, D)), 1e-6
    for i, d in np.ndindex(r, D):
        shift = np.zeros((2 * r, D))
        shift[r + i, d] = step
        up, down = (np.sum(probe * by_hand(keys[: 2 * r] + s * shift, B[: 2 * r], x, k=2)[0]) for s in (1, -1))
        wanted[i, d] = (up - down) / (2 * step)
    assert np.abs(wanted).max() > 1e-3
    np.testing.assert_allclose(np.asarray(by_key)[r : 2 * r], wanted, rtol=2e-3, atol=1e-4)


def test_acceptance_6_new_experts_without_values_take_their_part_from_the_old_ones():
    made = router(temperature=0.3)
    fresh = np.where(np.arange(E)[:, None] < r, B, 0)
    before, after = (np.asarray(change(made, A, fresh, X, tasks=n)) for n in (1, 2))
    w = by_hand(A[: 2 * r], B[: 2 * r], X, tau=0.3)[1][:, :r]  # over the larger set: norm, places and mass
    np.testing.assert_allclose(after, (w * (X @ A[:r].T)) @ B[:r], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(before, by_hand(A[:r], B[:r], X, tau=0.3)[0], rtol=1e-4, atol=1e-5)
    moved = np.abs(after - before).max(-1) / np.abs(before).max(-1)
    assert np.median(moved) > 0.1, "not an identity"


@pytest.mark.parametrize("tasks", [1, 2, 3])
def test_acceptance_7_a_bank_with_a_mask_is_the_experts_that_are_open(tasks):
    """In value, in the slope of x and in those of the experts that learn; what is closed may hold anything."""
    made, probe, n = router(prune=0.1), normal(T, OUT, seed=4), tasks * r
    spoilt = [np.where(np.arange(E)[:, None] < n, leaf, 1e6) for leaf in (A, B)]
    of = lambda keys, B, x, train: jnp.sum(  # noqa: E731
        single(probe) * change(made, keys, B, x, tasks=tasks, train=train)
    )
    slopes = jax.jit(jax.grad(of, (0, 1, 2)), static_argnums=3)
    for train in (False, True):
        y = by_hand(A[:n], B[:n], X, delta=-1.0 if train else 0.1)[0]
        np.testing.assert_allclose(change(made, *spoilt, X, tasks, train), y, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(change(made, A[:n], B[:n], X, tasks, train), y, rtol=1e-4, atol=1e-5)
    whole, compact = (slopes(*map(single, at), single(X), True) for at in (spoilt, (A[:n], B[:n])))
    for got, wanted in zip(whole, compact, strict=True):
        np.testing.assert_allclose(got[: len(wanted)], wanted, rtol=1e-4, atol=1e-5)


def test_the_keys_read_the_adapters_own_dropped_input():
    made, key = router(), jax.random.key(3)
    seen = lowrank.dropped(single(X), lowrank.dropout(key, 0.5), jnp.arange(T))  # as placements/projection.py does
    ctx = small.context(1, T, key=key, train=True, dropout=0.5)
    z = made.input_of(single(X)[None], {"A": single(A)[:, None]}, ctx)
    np.testing.assert_allclose(z[0], np.asarray(seen) @ A.T, rtol=1e-4, atol=1e-5)
    assert np.abs(z[0] - X @ A.T).max() > 0.1


def test_a_token_that_no_key_sees_is_finite_in_value_and_gradient():
    made = router(temperature=1.0)
    x = np.concatenate([X[:2], np.zeros((1, D))])
    of = lambda keys, B, x: jnp.sum(change(made, keys, B, x, train=True))  # noqa: E731
    value, slopes = jax.jit(jax.value_and_grad(of, (0, 1, 2)))(single(A), single(B), single(x))
    assert all(np.isfinite(v).all() for v in jax.tree.leaves((value, slopes)))


def test_the_linear_ablation_chooses_by_a_matrix_and_keeps_the_activation():
    made = router(score="linear", temperature=0.3)
    site = type("Site", (), dict(experts=E, d_in=D))
    assert made.init_leaves(jax.random.key(0), site, 0)["W"].shape == (E, D) and not router().init_leaves(None, site, 0)
    W, ctx = normal(E, D, seed=7), small.context(1, T, state={"tasks": jnp.int32(TASKS)})
    gates = small.routed(made, {"W": single(W)}, {}, made.input_of(single(X)[None], {}, ctx), ctx)[0].gates[0]
    np.testing.assert_allclose(gates, by_hand(W, B, X, tau=0.3)[1], atol=1e-5)


# ---- whole runs ----------------------------------------------------------------------------------------------------


def bank(data, **fields):
    """Three steps of each of three tasks; weight decay would move what has no gradient."""
    made = runs.config(data, regime=dict(name="continual"), optim="adamw", sites="q,down", steps=9, **fields)
    with made.unlocked():
        made.method.rules["all"] = common.rule(
            "q,down",
            experts="6",
            adapter=common.adapter(rank=1, alpha=4.0, dropout=0.0),
            router=dict(name="self_activated", k=2, per_task=2, prune=-1.0),
        )
        made.optim.weight_decay = 0.1
    schema.validate(made)
    return made


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bank")
    data = runs.write(folder)
    runs.start(bank(data), folder / "run")
    return folder / "run", data


def test_a_run_opens_experts_task_by_task_and_never_moves_those_of_others(run):
    """Whatever the optimizer: moments begin anew with a task, weight decay spares the bank and what is closed."""
    folder, _ = run
    leaves = {step: runs.arrays(folder, step) for step in (1, 3, 6, 9)}
    open_ = {step: runs.arrays(folder, step, "router_state") for step in (1, 3, 6, 9)}
    for step, tasks in ((1, 1), (3, 2), (6, 3), (9, 3)):  # the end of a task opens the next one's, but for the last
        assert all((tasks_of == tasks).all() for tasks_of in open_[step].values()), step
    own = np.arange(6) // 2
    for path, end in leaves[9].items():
        if path.rpartition("/")[2] not in ("A", "B"):
            continue
        for task, (before, after) in enumerate(((1, 3), (3, 6), (6, 9))):
            same = np.array([np.array_equal(leaves[before][path][:, i], leaves[after][path][:, i]) for i in range(6)])
            np.testing.assert_array_equal(same, own != task, err_msg=f"{path}, task {task}")
        np.testing.assert_array_equal(end[:, own == 0], leaves[3][path][:, own == 0])
    report = json.loads((folder / "report" / "continual.json").read_text())
    assert np.isfinite(np.array(report["accuracy"], float)).all() and report["forgetting"] is not None


@pytest.mark.slow
@pytest.mark.parametrize("stop", [4, 6])
def test_a_bank_that_was_stopped_ends_with_the_same_bits(run, tmp_path, stop):
    folder, data = run
    other = runs.cut(folder, tmp_path / "run", stop)
    runs.start(bank(data), other)
    assert runs.digests(other, 9) == runs.digests(folder, 9)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["gather", "all_to_all", "ragged_all_to_all"])
def test_keys_in_shards_choose_as_on_one_device(engine):
    """Experts over two devices, widths over two: the router reads all keys wherever they lie. In the second task."""
    few = {"sites": "q,down", "experts": "16"}
    config = method("mora_cl", **{f"method.rules.all.{field}": value for field, value in few.items()})
    one = Case(config)
    many = Case(config, mesh=make_mesh(dict(data=2, fsdp=1, expert=2, tensor=2)), engine=engine)
    adapters = random_adapters(one.model, one.params)
    found = []
    for case in (one, many):
        state = case.start(adapters)
        state = dataclasses.replace(state, router_state=next_task(case.model, state.router_state))
        found += case.run(state)[1:]
    same_step(*found)


def test_what_a_bank_cannot_hold_is_refused_before_anything_compiles(tmp_path):
    made = bank(runs.write(tmp_path))
    made.method.rules["all"].experts = "5"
    with pytest.raises(InputError, match=re.escape("method.rules.all.experts: got room for 2 tasks")):
        runs.start(made, tmp_path / "run")
    for changes, field in (
        ({f"{RULE}adapter__rank": 2}, "method.rules.all.adapter.rank: got 2; expected 1"),
        ({f"{RULE}adapter__name": "dora"}, "method.rules.all.adapter.name: got 'dora'"),
        ({f"{RULE}sites": "ffn"}, "method.rules.all.sites: got 'ffn'"),
        ({f"{RULE}router__k": 1}, "method.rules.all.router.k: got 1"),
    ):
        with pytest.raises(InputError, match=re.escape(field)):
            small.config("mora_cl", **changes)


def test_other_routers_states_pass_over_a_tasks_end_unchanged():
    model, _, _, state = small.build("smora", **{f"{RULE}sites": "q", f"{RULE}experts": "8"})
    jax.tree.map(np.testing.assert_array_equal, next_task(model, state), state)
