"""adapter x router x placement x init: pairwise covers, one traced by shapes and one run; every point with `--all`."""

import itertools

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from molora_jax import config as schema
from molora_jax.core import trees
from molora_jax.errors import InputError
from molora_jax.training.step import COUNTS, fresh
from tests.battery import reference
from tests.battery.cases import (
    BATCH,
    CHECKLIST,
    FEW,
    LATER,
    PLACEMENTS,
    PRODUCT,
    SMALL,
    WIDE,
    Case,
    combination,
    mesh8,
    random_adapters,
)
from tests.battery.checks import check_gradients, check_step, check_tree, same_step


def pairwise(product):
    """A few points in which every two members of different axes meet, found greedily."""

    def pairs_of(point):
        return {((i, a), (j, b)) for (i, a), (j, b) in itertools.combinations(enumerate(point), 2)}

    missing, chosen = set().union(*map(pairs_of, product)), []
    while missing:
        best = max(product, key=lambda point: len(pairs_of(point) & missing))
        missing -= pairs_of(best)
        chosen.append(best)
    return tuple(chosen)


def points(ordinary):
    """Of the whole product and the later adapters; those outside `ordinary` are left to `--all`."""
    slow = lambda point: [] if point in ordinary else [pytest.mark.slow]  # noqa: E731
    return pytest.mark.parametrize("point", [pytest.param(p, marks=slow(p), id="-".join(p)) for p in WIDE + LATER])


OLDER = tuple(point for point in WIDE if point[1] not in CHECKLIST)
COVER, WIDE_COVER = pairwise(PRODUCT), pairwise(OLDER)
LATER_ONCE = {point for point in LATER if point[1:3] == ("softmax_topk", "projection")}
LATER_ONCE |= {("lora", router, ("projection", "ffn")[i % 2], "kaiming") for i, router in enumerate(CHECKLIST)}
every, widely_covered = points({*WIDE, *LATER_ONCE}), points({*WIDE_COVER, *LATER_ONCE})
covered = points({*COVER, ("vera", "softmax_topk", "projection", "kaiming")})  # whose experts share factors


@pytest.mark.parametrize(("cover", "product"), [(COVER, PRODUCT), (WIDE_COVER, OLDER)])
def test_the_cover_is_one(cover, product):
    for i, j in itertools.combinations(range(4), 2):
        assert {(p[i], p[j]) for p in cover} == {(p[i], p[j]) for p in product}
    assert len(cover) < len(product) / 2


@widely_covered
def test_shapes_of_every_combination(point, request):
    """Init and step trace; the state keeps its shapes; metrics are float32 scalars and lists over layers.

    An ordinary run has a cover in which every two members of different axes meet, less what tests/left_out.py names,
    and two of the seven projections: they are traced alike.
    """
    few = point[2] == "projection" and not request.config.getoption("--all")
    case = Case(combination(*point, **({"method.rules.mix.sites": "q,down"} if few else {})))
    state = jax.eval_shape(lambda p: fresh(case.model, case.optimizer, p, case.frozen, jax.random.key(0)), case.params)
    after, metrics = jax.eval_shape(case.step, state, case.params, BATCH)
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731
    assert shapes(after) == shapes(state)
    check_tree(case.model, state.adapters)
    trainable, fixed = (flatten_dict(x, sep="/") for x in trees.split(state.adapters, case.frozen))
    rule, names = case.model.rules[0], [path.rpartition("/")[2] for path in fixed]
    assert sum(name in ("A0", "B0") for name in names) == (2 * len(rule.projections) if point[3] == "pissa" else 0)
    assert set(names) <= {*rule.adapter.FROZEN, *(rule.router.FROZEN if rule.router is not None else ())}
    assert flatten_dict(state.opt[0], sep="/").keys() == trainable.keys(), "optimizer state for trainable leaves alone"
    for table in metrics.pop("site").values():
        for name, x in table.items():
            assert x.shape[:1] == (SMALL.layers,) and len(x.shape) == 1 + (name in COUNTS), name
    assert all(x.shape == () for x in metrics.values())


@covered
def test_combination(point, request):
    """The start is the base; value, loss, statistics and gradients are the naive form's; the loss falls.

    An ordinary run has few of the seven projections here: all seven are run against the naive form in `test_methods`
    (LoRA).
    """
    few = point[2] == "projection" and not request.config.getoption("--all")
    case = Case(combination(*point, **({"method.rules.mix.sites": FEW[PLACEMENTS["projection"]]} if few else {})))
    state = case.start()
    np.testing.assert_allclose(case.hidden(state.adapters), case.hidden({}), atol=1e-5)

    adapters = random_adapters(case.model, case.params)
    wanted, _ = reference.forward(np, case.model, *map(reference.as_float64, (case.params, adapters)), BATCH)
    keep = BATCH["segment_ids"] > 0
    np.testing.assert_allclose(case.hidden(adapters)[keep], wanted[keep], rtol=1e-5, atol=1e-5)
    _, metrics, gradients = case.run(case.start(adapters))
    check_step(case, adapters, metrics)
    check_gradients(case, adapters, gradients, metrics["grad_norm"])

    losses = []
    for _ in range(15):
        state, metrics, _ = case.run(state)
        losses.append(float(metrics["lm_loss"]))
    assert losses[-1] < 0.9 * losses[0], losses


@pytest.mark.slow
@every
def test_eight_devices_equal_one(point):
    one, eight = Case(combination(*point)), Case(combination(*point), mesh=mesh8())
    adapters = random_adapters(one.model, one.params)
    _, metrics, gradients = one.run(one.start(adapters))
    _, metrics8, gradients8 = eight.run(one.start(adapters))
    same_step(metrics, gradients, metrics8, gradients8)


@pytest.mark.slow
@every
def test_bfloat16_is_finite(point):
    case = Case(combination(*point), dtype="bfloat16")
    _, metrics, gradients = case.run(case.start(random_adapters(case.model, case.params)))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((metrics, gradients)))


@pytest.mark.parametrize("router", ["softmax_topk", "top_p"])
def test_dora_on_a_routed_ffn_needs_down_per_expert(router):
    config = combination("dora", router, "ffn", "kaiming")
    assert config.method.rules.mix.down == "per_expert"
    config.method.rules.mix.down = "once"
    with pytest.raises(InputError, match="row factor sits after W_d") as error:
        schema.validate(config)
    assert error.value.where == "method.rules.mix.down" and "per_expert" in str(error.value)


def test_dora_on_an_unrouted_ffn_takes_either_down():
    """One expert: W_d is applied once either way, and the row factor after it."""
    point = ("dora", "none", "ffn", "kaiming")
    forms = [Case(combination(*point, **{"method.rules.mix.down": down})) for down in ("once", "per_expert")]
    adapters = random_adapters(forms[0].model, forms[0].params)
    once, each = (case.hidden(adapters) for case in forms)
    np.testing.assert_allclose(once, each, rtol=1e-5, atol=1e-5)
