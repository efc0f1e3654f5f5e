"""The shared battery, for every row of the methods table: a new method is tested by being listed."""

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from molora_jax.backbones.compile import compile_model
from molora_jax.backbones.families import SMOLLM2
from molora_jax.backbones.sizes import num_trainable
from molora_jax.catalogue.methods import METHODS, methods_table
from tests.battery import reference
from tests.battery.cases import BATCH, DEEP, ROOT, Case, mesh8, method, random_adapters, shortened
from tests.battery.checks import check_gradients, check_step, check_tree, same_step

every = pytest.mark.parametrize("name", METHODS)


@pytest.fixture(scope="module")
def config_of(request):
    """A method's config; an ordinary run has it with few projections and experts."""
    whole = request.config.getoption("--all")
    return lambda name: method(name, **({} if whole else shortened(name)))


@pytest.fixture(scope="module")
def cases(config_of):
    """One case a method, compiled once for all tests of this file."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = Case(config_of(name))
        return made[name]

    return get


@every
def test_the_start_is_the_base(cases, name):
    case = cases(name)
    adapters = case.start().adapters
    check_tree(case.model, adapters)
    if METHODS[name].zero_init:
        np.testing.assert_allclose(case.hidden(adapters), case.hidden({}), atol=1e-5)


@every
def test_parameter_count_is_the_papers(name):
    """On shapes alone: of a small decoder, and of SmolLM2 as docs/methods.md says it."""
    for decoder in (DEEP, SMOLLM2):
        model = compile_model(method(name, decoder), decoder)
        assert num_trainable(model) == METHODS[name].params(decoder)


@every
def test_equals_the_naive_form_in_value_and_gradient(cases, name):
    case = cases(name)
    adapters = random_adapters(case.model, case.params)
    wanted, _ = reference.forward(np, case.model, *map(reference.as_float64, (case.params, adapters)), BATCH)
    keep = BATCH["segment_ids"] > 0
    np.testing.assert_allclose(case.hidden(adapters)[keep], wanted[keep], rtol=1e-5, atol=1e-5)
    _, metrics, gradients = case.run(case.start(adapters))
    check_step(case, adapters, metrics)
    check_gradients(case, adapters, gradients, metrics["grad_norm"], METHODS[name].exceptions)


# A row that is one option away from another differs in nothing that a mesh or a dtype could see. Ordinary runs take one
# method for each way in which leaves lie: experts of an FFN, of a projection, pools that layers share, a chain, a state
# of the router; --all takes every one.
MESHED, HALF = ("mixlora", "mola", "mos", "coe", "smora"), ("mixlora", "mos", "coe", "smora")
few = lambda names: pytest.mark.parametrize(  # noqa: E731
    "name",
    [pytest.param(n, marks=[] if n in names else pytest.mark.slow) for n, row in METHODS.items() if not row.overrides],
)


@few(MESHED)
def test_eight_devices_equal_one(cases, config_of, name):
    one, eight = cases(name), Case(config_of(name), mesh=mesh8())
    adapters = random_adapters(one.model, one.params)
    _, metrics, gradients = one.run(one.start(adapters))
    _, metrics8, gradients8 = eight.run(one.start(adapters))
    same_step(metrics, gradients, metrics8, gradients8)


@every
def test_loss_falls_on_a_small_batch(cases, name):
    case = cases(name)
    state, losses = case.start(), []
    for _ in range(15):
        state, metrics, _ = case.run(state)
        losses.append(float(metrics["lm_loss"]))
    assert losses[-1] < 0.8 * losses[0], losses
    assert int(state.step) == 15 and int(state.skipped) == 0


@few(HALF)
def test_bfloat16_base_is_finite(config_of, name):
    case = Case(config_of(name), dtype="bfloat16")
    adapters = random_adapters(case.model, case.params)
    state, metrics, gradients = case.run(case.start(adapters))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((metrics, gradients, jax.device_get(state.adapters))))
    assert {str(x.dtype) for x in gradients.values()} == {"float32"}, "factors and routers stay float32"


@every
def test_row_of_the_table_is_whole(name):
    row = METHODS[name]
    assert (ROOT / row.config).is_file()
    (line,) = [x for x in methods_table().splitlines() if x.startswith(f"| {row.title} |")]
    assert (f"https://arxiv.org/abs/{row.paper}" if row.paper else "-") in line and row.config in line
    assert flatten_dict(row.overrides, sep=".") == row.overrides
    assert line.replace("\\|", "").count("|") == 9, "eight cells"
