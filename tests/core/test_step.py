"""The training step: accumulation, clipping, steps that are not finite, stages that freeze, schedules, trees."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from molora_jax import config as schema
from molora_jax.core import trees
from molora_jax.errors import InputError
from molora_jax.losses.z_loss import ZLoss
from molora_jax.optim import OPTIMIZERS
from molora_jax.regimes import stages as stages_lib
from molora_jax.training.step import make_step
from tests.battery.cases import BATCH, TARGETS_PER_ROW, Case, combination, method, random_adapters, shortened
from tests.battery.checks import matches

# the same number of targets in every row, so that every micro-step has the same weight
EVEN = dict(BATCH, loss_weight=((np.cumsum(BATCH["segment_ids"] > 0, axis=1) <= 2) & (BATCH["segment_ids"] > 0)) * 1.0)
EVEN["loss_weight"] = EVEN["loss_weight"].astype(np.float32)
POINT = ("lora", "softmax_topk", "projection", "kaiming")
SITES = {"method.rules.mix.sites": "q,down"}  # with two projections a step compiles in a third of the time


def point(**changes):
    return combination(*POINT, **SITES, **changes)


@functools.cache
def uneasy():
    """Dropout and a warm-up: a case for every test that looks at one step after another."""
    return Case(point(**{"method.rules.mix.adapter.dropout": 0.5, "optim.warmup": 4}))


def balanced(accumulate, **options):
    config = point()
    del config.losses["entropy"]
    config.losses.balance.update(weight=1.0, accumulate=accumulate, **options)
    return config


def rows(batch, i, n):
    return {name: value[i::n] for name, value in batch.items()}


def close(a, b, tolerance):
    largest = max(np.abs(x).max() for x in b.values())
    matches(a, b, rtol=0, atol=tolerance * largest)


@pytest.mark.parametrize(
    "options", [dict(over="layer"), dict(over="all", normalise="tokens", counts="soft"), dict(per_example=True)],
    ids=["layer", "all-soft", "per_example"],
)  # fmt: skip
def test_exact_accumulation_is_the_whole_batch(options):
    whole, parts = Case(balanced("exact", **options)), Case(balanced("exact", **options), accumulate=4)
    adapters = random_adapters(whole.model, whole.params)
    _, metrics, gradients = whole.run(whole.start(adapters), EVEN)
    _, metrics4, gradients4 = parts.run(parts.start(adapters), EVEN)
    for name in ("loss", "lm_loss", "aux/balance", "grad_norm", "tokens"):
        np.testing.assert_allclose(metrics4[name], metrics[name], rtol=1e-5, err_msg=name)
    matches(metrics4["site"], metrics["site"], rtol=1e-5, atol=1e-6)
    close(gradients4, gradients, 1e-5)


@pytest.mark.parametrize("name", ["dynmole", "loramoe", "rmoe", "coe", "llava_mole"])
def test_a_methods_losses_are_those_of_the_whole_batch(name):
    config = method(name, **shortened(name))
    whole, parts = Case(config), Case(config, accumulate=4)
    adapters = random_adapters(whole.model, whole.params)
    _, metrics, gradients = whole.run(whole.start(adapters), EVEN)
    _, metrics4, gradients4 = parts.run(parts.start(adapters), EVEN)
    for key in (k for k in metrics if k.startswith("aux/") or k == "loss"):
        np.testing.assert_allclose(metrics4[key], metrics[key], rtol=1e-5, err_msg=key)
    close(gradients4, gradients, 1e-5)


@dataclasses.dataclass(frozen=True)
class Wide(ZLoss):
    """A loss of somebody's that gives two numbers."""

    def value(self, stats):
        return jnp.stack([super().value(stats)] * 2)


@pytest.mark.parametrize("accumulate", ["micro", "exact"])
def test_a_loss_that_is_no_scalar_is_named(accumulate):
    case = Case(point())
    model = dataclasses.replace(case.model, losses=(("mine", Wide(accumulate=accumulate)),))
    step = make_step(
        model, case.optimizer, lambda step: 0.0, clip=0.0, frozen=case.frozen, accumulate=2, constrain=lambda x: x,
        targets_per_row=TARGETS_PER_ROW,
    )  # fmt: skip
    with pytest.raises(InputError, match=r"losses.mine: got Wide.value, which gave shape \(2,\); expected a scalar"):
        jax.eval_shape(step, case.start(), case.params, BATCH)


def test_micro_accumulation_is_the_mean_of_the_micro_steps_and_no_more():
    options = dict(over="layer")
    parts, one = Case(balanced("micro", **options), accumulate=4), Case(balanced("micro", **options))
    adapters = random_adapters(one.model, one.params)
    _, metrics, gradients = parts.run(parts.start(adapters), EVEN)
    each = [one.run(one.start(adapters), rows(EVEN, i, 4)) for i in range(4)]
    np.testing.assert_allclose(metrics["aux/balance"], np.mean([m["aux/balance"] for _, m, _ in each]), rtol=1e-5)
    close(gradients, {path: np.mean([g[path] for *_, g in each], axis=0) for path in gradients}, 1e-5)
    _, exact, whole = one.run(one.start(adapters), EVEN)
    assert abs(exact["aux/balance"] / metrics["aux/balance"] - 1) > 1e-3, "balance is not linear in its sums"
    np.testing.assert_allclose(metrics["lm_loss"], exact["lm_loss"], rtol=1e-5)
    assert any(np.abs(whole[p] - gradients[p]).max() > 1e-3 * np.abs(whole[p]).max() for p in whole)


def test_clip_bounds_the_gradient_that_the_optimizer_sees():
    case = Case(method("lora"), clip=0.01)
    _, metrics, gradients = case.run(case.start(random_adapters(case.model, case.params)))
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in gradients.values()))
    np.testing.assert_allclose(norm, 0.01, rtol=1e-5)
    assert metrics["grad_norm"] > 0.1, "the metric is the norm before clipping"


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted():
    case = uneasy()
    state, _, _ = case.run(case.start())
    bad = dict(BATCH, loss_weight=BATCH["loss_weight"] * np.where(np.arange(8) == 5, np.inf, 1.0)[:, None])
    bad["loss_weight"] = np.nan_to_num(bad["loss_weight"], nan=0.0, posinf=np.inf).astype(np.float32)
    after = state
    for count in (1, 2):
        after, metrics, _ = case.run(after, bad)
        assert int(after.skipped) == int(metrics["skipped"]) == count
        assert int(after.step) == 1 + count
    kept = lambda s: jax.device_get((s.adapters, s.opt, s.router_state))  # noqa: E731
    jax.tree.map(np.testing.assert_array_equal, kept(after), kept(state))
    healed, metrics, _ = case.run(after)
    assert int(metrics["skipped"]) == 0
    assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (healed.adapters, after.adapters)), strict=True))


def test_dropout_depends_on_the_step_and_on_nothing_else():
    """Two runs of a step are bit-equal; another step, or another micro-step, draws other masks."""
    case = uneasy()
    state = case.start(random_adapters(case.model, case.params))
    _, a, _ = case.run(state)
    _, b, _ = case.run(state)
    _, c, _ = case.run(state.replace(step=jnp.int32(1)))
    assert a["lm_loss"] == b["lm_loss"] != c["lm_loss"]


def test_two_stages_freeze_a_and_then_let_it_move():
    config = point()
    config.unlock()
    config.train.steps = 4
    stage = dict(tasks="", route="", set={})
    config.schedule = dict(s00=dict(stage, steps=2, freeze="*/A"), s01=dict(stage, steps=0, freeze="*/router/*"))
    schema.validate(config)
    first, second = stages_lib.stages(config)
    assert (first.start, first.stop, second.start, second.stop) == (0, 2, 2, 4)
    assert [stages_lib.stage_at((first, second), i) for i in range(5)] == [first, first, second, second, second]
    state = None
    for stage, moves, stays in ((first, {"B", "W"}, {"A"}), (second, {"A", "B"}, {"W"})):
        case = Case(stage.config, freeze=stage.freeze)
        state = case.start(random_adapters(case.model, case.params) if state is None else state.adapters)
        before = flatten_dict(jax.device_get(state.adapters), sep="/")
        for _ in range(stage.stop - stage.start):
            state, _, gradients = case.run(state)
        after = flatten_dict(jax.device_get(state.adapters), sep="/")
        assert {path.rpartition("/")[2] for path in gradients} == moves, "optimizer state for trainable leaves alone"
        for path, leaf in after.items():
            assert (path.rpartition("/")[2] in stays) == np.array_equal(leaf, before[path]), path


def test_split_and_merge_are_inverse():
    tree = {"a": {"000-001": {"q": {"A": 1, "B": 2, "A0": 3}, "router": {"q": {"W": 4}}}, "shared": {"A0": 5}}}
    for frozen in ((), ("a/*/A0",), ("a/*/router/*",), ("*",), ("*/A", "*/B")):
        train, fixed = trees.split(tree, frozen)
        assert trees.merge(train, fixed) == trees.merge(fixed, train) == tree
        paths = set(flatten_dict(train, sep="/")), set(flatten_dict(fixed, sep="/"))
        assert not paths[0] & paths[1]
    assert flatten_dict(trees.split(tree, ("a/*/A0",))[1], sep="/") == {"a/000-001/q/A0": 3, "a/shared/A0": 5}
    assert trees.split(tree, ("*",))[0] == {}


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 4])
def test_schedule_values(decay, warmup):
    total, lr = 20, 0.5
    got = [
        float(OPTIMIZERS["adamw"](learning_rate=lr, decay=decay, warmup=warmup).schedule(total)(i))
        for i in range(total)
    ]
    for i, value in enumerate(got):
        part = (i - warmup) / (total - warmup)
        wanted = dict(constant=1.0, linear=1 - part, cosine=(1 + np.cos(np.pi * part)) / 2)[decay]
        np.testing.assert_allclose(value, lr * ((i + 1) / warmup if i < warmup else wanted), rtol=1e-5, err_msg=str(i))


def test_the_lr_metric_is_the_rate_of_that_step():
    case = uneasy()
    state = case.start()
    for i in range(5):
        state, metrics, _ = case.run(state)
        np.testing.assert_allclose(metrics["lr"], 1e-2 * min(i + 1, 4) / 4, rtol=1e-6)
