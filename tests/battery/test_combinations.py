"""What the walk of docs/combinations.md calls working traces."""

import dataclasses

import jax
import pytest

from configs import common
from molora_jax.catalogue.combinations import Verdict, config_of, decoder_of, of_config, points, verdict
from molora_jax.engines import ENGINES
from molora_jax.training.step import fresh
from tests.battery.cases import BATCH, Case
from tests.engines.problems import mesh

POINTS = {"-".join(vars(point).values()): point for point in points()}


@pytest.mark.parametrize("name", ["mos-x_lora-chain-replicate", "mos-sigmoid_topk-ffn-replicate"])
def test_a_point_traces(name):
    trace(POINTS[name])


def test_a_config_is_told_the_same_under_every_engine():
    """So the walk asks a config once for all four."""
    for point in points()[::397]:
        told = [of_config(dataclasses.replace(point, engine=engine), common.get_config()) for engine in ENGINES]
        assert len({one if isinstance(one, Verdict) else one[0] for one in told}) == 1, point


def pytest_generate_tests(metafunc):
    """All points with `--all` alone: ten thousand items that are then left out cost seconds a worker."""
    if "every" in metafunc.fixturenames:
        metafunc.parametrize("every", POINTS if metafunc.config.getoption("--all") else list(POINTS)[:1])


@pytest.mark.slow
def test_every_point_traces_or_has_a_reason(every):
    trace(POINTS[every])


def trace(point):
    """A whole training step by shapes, experts over a mesh axis of two."""
    decoder = decoder_of(point)
    said = verdict(point, common.get_config())
    if said.by:
        assert len(said.reason) > 20, "a reason, not a name"
        return
    config = config_of(point, common.get_config(), down=said.down)
    case = Case(config, decoder, mesh=mesh(data=4, expert=2), engine=point.engine)
    state = jax.eval_shape(lambda p: fresh(case.model, case.optimizer, p, case.frozen, jax.random.key(0)), case.params)
    after, metrics = jax.eval_shape(case.step, state, case.params, BATCH)
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731
    assert shapes(after) == shapes(state) and "loss" in metrics
