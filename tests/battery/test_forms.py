"""The same function in other forms: eager, unrolled, other remat policies, other segments, padding, packing."""

import jax
import numpy as np
import pytest

from molora_jax.backbones.compile import compile_model
from tests.battery.cases import BATCH, SMALL, Case, base, combination, method, random_adapters
from tests.battery.checks import matches

POINTS = {"projection": ("lora", "top_p", "projection", "pissa"), "ffn": ("rslora", "softmax_topk", "ffn", "kaiming"),
          "per_expert": ("dora", "softmax_topk", "ffn", "kaiming")}  # fmt: skip


slowest = lambda values, quick: [v if v == quick else pytest.param(v, marks=pytest.mark.slow) for v in values]  # noqa: E731


@pytest.mark.parametrize("point", slowest(POINTS, "ffn"))
def test_jit_equals_eager(point):
    """`disable_jit` runs the layer loop and every custom derivative in Python: scanned = unrolled = eager."""
    case = Case(combination(*POINTS[point]))
    adapters = random_adapters(case.model, case.params)

    def loss(adapters):
        hidden, stats, _, _ = case.model.hidden(case.params, adapters, {}, BATCH)
        return (hidden * np.sin(np.arange(hidden.size)).reshape(hidden.shape)).mean(), stats

    (value, stats), g = jax.jit(jax.value_and_grad(loss, has_aux=True))(adapters)
    with jax.disable_jit():
        (eager, eager_stats), eager_g = jax.value_and_grad(loss, has_aux=True)(adapters)
    np.testing.assert_allclose(value, eager, rtol=1e-5, atol=1e-8)
    matches(stats, eager_stats, rtol=1e-5, atol=1e-5)
    largest = max(np.abs(x).max() for x in jax.tree.leaves(g))
    matches(g, eager_g, rtol=1e-4, atol=1e-5 * largest)


@pytest.mark.parametrize("name", slowest(["mixlora", "dynamic_moe"], "mixlora"))
def test_remat_changes_nothing(name):
    cases = [Case(method(name), remat=remat) for remat in ("none", "dots", "full")]
    adapters = random_adapters(cases[0].model, cases[0].params)
    (_, metrics, gradients), *others = [case.run(case.start(adapters)) for case in cases]
    largest = max(np.abs(g).max() for g in gradients.values())
    for _, other, other_gradients in others:
        matches(metrics, other, rtol=1e-6, atol=1e-6)
        matches(gradients, other_gradients, rtol=1e-5, atol=1e-6 * largest)


def test_regrouping_layers_changes_no_start_and_no_value():
    """A second rule that acts on layer 1 alone cuts the first rule's segment in two; its B = 0 leaves the function."""
    point = ("lora", "softmax_topk", "projection", "kaiming")
    whole = Case(combination(*point))
    config = combination(*point)
    rules = config.method.rules.to_dict()
    rules["zzz"] = dict(rules["mix"], layers="1", experts="1")
    del rules["zzz"]["router"]
    config.method.rules = rules
    cut = Case(config)
    assert [s.name for s in whole.model.segments] == ["000-001"]
    assert [s.name for s in cut.model.segments] == ["000-000", "001-001"]
    a, b = whole.start().adapters, cut.start().adapters
    joined = jax.tree.map(lambda *x: np.concatenate(x), *(b["mix"][s.name] for s in cut.model.segments))
    matches(a["mix"]["000-001"], joined, rtol=0)
    noisy = random_adapters(whole.model, whole.params)
    pieces = {s: jax.tree.map(lambda x, i=i: x[i : i + 1], noisy["mix"]["000-001"]) for i, s in enumerate(b["mix"])}
    out = cut.hidden({"mix": pieces, "zzz": b["zzz"]})
    np.testing.assert_allclose(out, whole.hidden(noisy), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("experts", ["4", "4|4", "4*2", "4*1,4*1"])
def test_ways_of_writing_equal_counts_are_one_segment(experts):
    config = combination("lora", "softmax_topk", "ffn", "kaiming", **{"method.rules.mix.experts": experts})
    model = compile_model(config, SMALL)
    assert [s.name for s in model.segments] == ["000-001"] and model.rules[0].experts == (4, 4)


@pytest.mark.parametrize("point", POINTS.values(), ids=POINTS)
def test_padding_and_neighbours_do_not_reach_an_example(point):
    """Other tokens at padding and in the second example of each row: the first example's states stay."""
    case = Case(combination(*point))
    adapters = random_adapters(case.model, case.params)
    first = BATCH["segment_ids"] == 1
    other = dict(BATCH, tokens=np.where(first, BATCH["tokens"], 77 - BATCH["tokens"] // 2))
    run = jax.jit(lambda b: case.model.hidden(case.params, adapters, {}, b)[0])
    a, b = run(BATCH), run(other)
    np.testing.assert_allclose(a[first], b[first], rtol=1e-6, atol=1e-6)
    assert np.abs(np.asarray(a - b)[~first]).max() > 0.1, "the change was real"


def test_padding_takes_the_base_and_counts_nowhere():
    """At padding the output is the base's, and an all-padding row leaves every statistic as it was."""
    case = Case(combination("lora", "top_p", "ffn", "kaiming"))
    adapters = random_adapters(case.model, case.params)
    alone = {k: np.where(BATCH["segment_ids"] == 0, BATCH[k], 0).astype(v.dtype) for k, v in BATCH.items()}
    run = jax.jit(lambda a, b: case.model.hidden(case.params, a, {}, b)[:2])
    hidden, stats = run(adapters, alone)
    plain = jax.jit(lambda b: case.model.without_rules().hidden(case.params, {}, {}, b)[0])(alone)
    np.testing.assert_allclose(hidden, plain, atol=1e-6)
    assert all(not np.any(x) for x in jax.tree.leaves(stats)), "padding is counted"


def test_base_is_never_differentiated():
    """The gradient tree that the optimizer sees holds adapter leaves; the base comes out as it went in."""
    case = Case(method("lora", **{"method.rules.all.sites": "q,down"}))
    before = jax.tree.map(np.copy, base(SMALL))
    state, _, gradients = case.run(case.start())
    assert {path.split("/")[0] for path in gradients} == {"all"}
    matches(before, case.params, rtol=0)
    assert set(state.adapters) == {"all"}
