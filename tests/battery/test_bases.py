"""The battery on other forms of the base: a head of its own, norms of queries and keys with heads wider than the model.

Two methods of different placements stand for all: what a base changes lies outside the experts.
"""

import numpy as np
import pytest

from tests.battery import reference
from tests.battery.cases import BASES, BATCH, Case, method, random_adapters
from tests.battery.checks import check_gradients, check_step, same_step
from tests.engines.problems import mesh


@pytest.mark.parametrize("base", BASES)
def test_equals_the_naive_form(base):
    decoder = BASES[base]
    case = Case(method("mixlora", decoder), decoder)
    adapters = random_adapters(case.model, case.params)
    wanted, _ = reference.forward(np, case.model, *map(reference.as_float64, (case.params, adapters)), BATCH)
    keep = BATCH["segment_ids"] > 0
    np.testing.assert_allclose(case.hidden(adapters)[keep], wanted[keep], rtol=1e-5, atol=1e-5)
    _, metrics, gradients = case.run(case.start(adapters))
    check_step(case, adapters, metrics)
    check_gradients(case, adapters, gradients, metrics["grad_norm"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixlora", "mola"])
@pytest.mark.parametrize("base", BASES)
def test_eight_devices_equal_one(base, name):
    """fsdp and tensor split the head."""
    decoder = BASES[base]
    one = Case(method(name, decoder), decoder)
    many = Case(method(name, decoder), decoder, mesh=mesh(data=2, fsdp=2, tensor=2), engine="replicate")
    adapters = random_adapters(one.model, one.params)
    _, metrics, gradients = one.run(one.start(adapters))
    _, metrics8, gradients8 = many.run(one.start(adapters))
    same_step(metrics, gradients, metrics8, gradients8)


@pytest.mark.slow
@pytest.mark.parametrize("base", BASES)
def test_loss_falls_on_a_small_batch(base):
    case = Case(method("mola", BASES[base]), BASES[base])
    state, losses = case.start(), []
    for _ in range(15):
        state, metrics, _ = case.run(state)
        losses.append(float(metrics["lm_loss"]))
    assert losses[-1] < 0.8 * losses[0], losses
