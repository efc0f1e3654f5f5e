"""Objectives and trained modules in the real step: micro-steps, devices, copies of base leaves."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from molora_jax import sharding
from molora_jax.core import trees
from molora_jax.engines import ENGINES, Engine
from molora_jax.objectives import Frozen, compile_objective
from molora_jax.runs.modules import Modules, base_leaves
from molora_jax.training.step import fresh, make_step, micro_batches
from tests.battery.cases import BATCH, SMALL, Case, combination, eagerly, random_adapters, record
from tests.battery.checks import matches
from tests.engines.problems import mesh

C = 3
POINT = ("lora", "softmax_topk", "projection", "kaiming")
OBJECTIVES = {
    "classify": {"name": "classify", "pooling": "mean"},
    "reward": {"name": "preference"},
    "dpo": {"name": "preference", "form": "dpo", "reference": "base"},
    "distill": {"name": "distill", "teacher": "x", "temperature": 2.0},
}
OF_TASKS = {"morph": ("translate", "emoji", "code"), "factbook": ("sentiment", "topic", "dialog", "math")}
POINTS = tuple(f"{category}:{task}" for category, tasks in OF_TASKS.items() for task in tasks)
EVERY = OBJECTIVES | {
    form: {"name": "reward_experts", "form": form, "points": POINTS} for form in ("category", "fused")
}
LABELLED = dict(BATCH, targets=BATCH["targets"].copy(), loss_weight=np.zeros_like(BATCH["loss_weight"]))
for row in range(8):
    for segment in (1, 2) if row % 3 else (1,):  # micro-steps of unequal weight
        last = np.flatnonzero(BATCH["segment_ids"][row] == segment)[-1]
        LABELLED["targets"][row, last], LABELLED["loss_weight"][row, last] = (row + segment) % C, 1.0


@functools.cache
def model_case():
    return Case(combination(*POINT, **{"method.rules.mix.sites": "q,down", "losses": {}}))


@functools.cache
def step_of(kind, *, accumulate=1, on=None, engine=None, copies=("norms", "embed")):
    """`(state, metrics, gradients)` of one step on the battery's small model with random adapters."""
    case, objective = model_case(), compile_objective(EVERY[kind])
    head = EVERY[kind]["name"]
    modules = Modules(((head, objective),), base_leaves(copies, case.params), SMALL.width, C)
    model = case.model if engine is None else dataclasses.replace(case.model, engine=Engine(engine, on))
    made = model, case.optimizer
    options = dict(seed=0, frozen=case.frozen, clip=0.0, targets_per_row=8, objective=objective, head=head)
    constrain = (lambda x: x) if on is None else sharding.constrain(on)
    step = make_step(*made, lambda step: 1e-2, accumulate=accumulate, constrain=constrain, **options)
    state = eagerly(fresh, *made, case.params, case.frozen, jax.random.key(5), modules.init)
    state = state.replace(adapters=jax.device_put(random_adapters(case.model, case.params)))
    rows, params = LABELLED if kind == "classify" else BATCH, case.params
    start = random_adapters(case.model, case.params, seed=8)
    fixed = {n: Frozen(params, start, state.router_state, model) for n in objective.frozen()}
    if on is not None:
        places = sharding.state_shardings(state, model, on)
        params = sharding.put(jax.device_get(params), sharding.param_shardings(case.model.config, params, on))
        state = sharding.put(jax.device_get(state), places)
        fixed = {n: f.replace(params=params) for n, f in fixed.items()}
        rows = sharding.put_batch(rows, on, 8)
        step = jax.jit(step, out_shardings=(places, sharding.replicated(on)))
    state, metrics = jax.jit(step)(state, params, rows, fixed)
    return state, jax.device_get(metrics), flatten_dict(jax.device_get(state.opt[0]), sep="/")


def same(one, other):
    for name in one[1]:
        if name not in ("site", "lr"):
            np.testing.assert_allclose(other[1][name], one[1][name], rtol=2e-5, atol=1e-7, err_msg=name)
    largest = max(np.abs(g).max() for g in one[2].values())
    matches(other[2], one[2], rtol=0, atol=2e-5 * largest)


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_four_micro_steps_are_the_whole_batch(kind):
    whole = step_of(kind)
    assert any(path.startswith("modules/base/") and np.abs(g).max() > 0 for path, g in whole[2].items())
    same(whole, step_of(kind, accumulate=4))


@pytest.mark.parametrize("kind", [pytest.param("category", marks=pytest.mark.slow), "fused"])
def test_rewards_of_experts_in_micro_steps_and_on_four_devices(kind):
    """Of the fused form the passes of all points are rows of one batch, four times as many."""
    whole = step_of(kind, copies=())
    assert any(np.abs(g).max() > 0 for path, g in whole[2].items() if path.startswith("modules/"))
    same(whole, step_of(kind, accumulate=4, copies=()))
    same(whole, step_of(kind, on=mesh(data=2, fsdp=2), copies=()))


def test_devices_and_trained_copies_change_no_value():
    """Pairs of rows stay whole on four devices; copies lie as the leaves that they stand for."""
    on = mesh(data=2, fsdp=2)
    one, four = step_of("dpo"), step_of("dpo", on=on)
    same(one, four)
    copy = four[0].modules["base"]["embed"].sharding
    own = {"embed": model_case().params["embed"]}
    assert copy.is_equivalent_to(sharding.param_shardings(SMALL, own, on)["embed"], 2)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_every_engine_on_eight_devices(kind, engine):
    same(step_of(kind), step_of(kind, on=mesh(data=2, expert=4), engine=engine))


def test_units_are_dealt_whole():
    rows = {"x": np.arange(16)[:, None]}
    dealt = micro_batches(rows, 4, 2)["x"][..., 0]
    assert dealt.shape == (4, 4)
    assert (dealt[:, ::2] % 2 == 0).all() and (dealt[:, 1::2] == dealt[:, ::2] + 1).all()
    assert sorted(np.asarray(dealt).reshape(-1)) == list(range(16))
    np.testing.assert_array_equal(micro_batches(rows, 4)["x"][1][:, 0], [1, 5, 9, 13])


def test_full_fine_tuning_is_the_gradient_of_every_base_leaf():
    """`all` without rules: the loss at the base's own values, every leaf with the gradient that jax gives for it."""
    model = model_case().model.without_rules()
    params, weight = model_case().params, BATCH["loss_weight"].sum()

    def loss(params):
        logits = model.logits(params, model.hidden(params, {}, {}, BATCH)[0])
        nll = jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, BATCH["targets"][..., None], -1)[..., 0]
        return jnp.sum(nll * BATCH["loss_weight"]) / weight

    want = jax.jit(jax.value_and_grad(loss))(params)
    modules = Modules((), base_leaves(("all",), params), SMALL.width, 0)

    step = make_step(
        model, record(), lambda step: 1e-2, seed=0, frozen=(), accumulate=1, clip=0.0, targets_per_row=12,
        constrain=lambda x: x,
    )  # fmt: skip
    state = eagerly(fresh, model, record(), params, (), jax.random.key(0), modules.init)
    state, metrics = jax.jit(step)(state, params, BATCH)
    np.testing.assert_allclose(metrics["loss"], want[0], rtol=1e-5)
    got, grads = flatten_dict(state.opt["modules"]["base"], sep="/"), flatten_dict(want[1], sep="/")
    assert got.keys() == grads.keys() == flatten_dict(params, sep="/").keys()
    largest = max(np.abs(g).max() for g in grads.values())
    matches(jax.device_get(got), jax.device_get(grads), rtol=1e-4, atol=1e-5 * largest)


def test_copies_are_read_in_the_dtype_of_the_base():
    params = {"embed": jnp.zeros((3, 2), jnp.bfloat16), "final_norm": jnp.ones(2, jnp.bfloat16)}
    copies = Modules((), ("final_norm",)).init(jax.random.key(0), params)
    assert copies["base"]["final_norm"].dtype == jnp.float32
    read = trees.overlay(params, {"final_norm": copies["base"]["final_norm"] * 3})
    assert read["final_norm"].dtype == jnp.bfloat16 and float(read["final_norm"][0]) == 3
    assert read["embed"] is params["embed"]
