"""Regimes from outside the tree: the worked example of CONTRIBUTING and lookahead train, remember and go on."""

import dataclasses
import re

import numpy as np
import pytest

from molora_jax.errors import InputError
from molora_jax.evaluation.run import load_run
from molora_jax.regimes.base import Regime, checked, one_stage
from tests.regimes.small import arrays, config, cut, digests, start, write


def test_the_mean_of_the_ends_of_its_parts(tmp_path):
    data = write(tmp_path)
    start(config(data, regime=dict(name="stages"), steps=4, save_every=2), tmp_path / "plain")
    regime = dict(name="tests.regimes.toy_regime:Swa", parts=2)
    start(config(data, regime=regime, steps=4, save_every=1), tmp_path / "swa")
    ends = [arrays(tmp_path / "plain", step) for step in (2, 4)]
    for path, leaf in arrays(tmp_path / "swa", 4).items():
        np.testing.assert_allclose(leaf, (ends[0][path] + ends[1][path]) / 2, rtol=1e-5, atol=1e-7)
    start(config(data, regime=regime, steps=4, save_every=1), cut(tmp_path / "swa", tmp_path / "again", 3))
    assert digests(tmp_path / "again", 4) == digests(tmp_path / "swa", 4)
    assert load_run(tmp_path / "swa", "latest").config.regime.parts == 2


def test_what_a_regime_keeps_of_the_state_survives_the_next_step(tmp_path):
    """Lookahead: its memory is the start at first (a warm start's too), then the very leaves that train on."""
    data, plain = write(tmp_path), dict(steps=2, save_every=1)
    regime = dict(name="tests.regimes.lookahead:Lookahead", every=2, pace=0.25)
    start(config(data, regime=dict(name="stages"), **plain), tmp_path / "first")
    warm = dict(init_from=str(tmp_path / "first"))
    start(config(data, regime=dict(name="stages"), **plain, **warm), tmp_path / "plain")
    start(config(data, regime=regime, steps=4, save_every=1, **warm), tmp_path / "ahead")
    began, fast = arrays(tmp_path / "first", 2), arrays(tmp_path / "plain", 2)
    for path, leaf in arrays(tmp_path / "ahead", 2).items():
        assert np.abs(fast[path] - began[path]).max() > 0
        np.testing.assert_allclose(leaf, 0.75 * began[path] + 0.25 * fast[path], rtol=1e-5, atol=1e-7)
        np.testing.assert_array_equal(leaf, arrays(tmp_path / "ahead", 3, "memory")[f"slow/{path}"])
    start(config(data, regime=regime, steps=4, save_every=1, **warm), cut(tmp_path / "ahead", tmp_path / "again", 3))
    assert digests(tmp_path / "again", 4) == digests(tmp_path / "ahead", 4)


@dataclasses.dataclass(frozen=True)
class Whole(Regime):
    def stages(self, config, data):
        return (one_stage(config, "whole", 0, config.train.steps),)


@dataclasses.dataclass(frozen=True)
class Grows(Whole):
    def memory(self, run):
        return {"seen": np.zeros(1)}

    def between(self, run, stage, state, memory):
        return state, {"seen": np.zeros(2)}, {}


@dataclasses.dataclass(frozen=True)
class Pair(Whole):
    def between(self, run, stage, state, memory):
        return state, memory


@dataclasses.dataclass(frozen=True)
class Replaces(Whole):
    def between(self, run, stage, state, memory):
        return state, memory, {"loss": 0.0, "mine": 1.0}


@pytest.mark.parametrize(
    "name, words",
    [("Grows", "float64[2] as memory/seen; expected float64[1]"), ("Pair", "2 values of `between`"),
     ("Replaces", "'loss' in the row of `between`")],
)  # fmt: skip
def test_what_is_no_end_of_a_stage_is_named(tmp_path, name, words):
    """Before it is saved: a checkpoint with a memory of another shape could not be gone on from."""
    made = config(write(tmp_path), regime=dict(name=f"tests.regimes.test_toy:{name}"), steps=1)
    with pytest.raises(InputError, match=re.escape(words)):
        start(made, tmp_path / "run")


def test_stages_are_without_gaps_and_of_their_own_names():
    made = config("sentiment", regime=dict(name="stages"), steps=4)
    stage = lambda name, at, stop: one_stage(made, name, at, stop)  # noqa: E731
    whole = [stage("a", 0, 2), stage("b", 2, 2), stage("c", 2, 4)]
    assert checked(whole, 4) == tuple(whole)
    for stages, words in (
        ([], "end at step 0; expected train.steps=4"), (whole[:1], "end at step 2"), (whole[1:], "after step 0"),
        ([*whole[:2], stage("c", 3, 4)], "'c' of steps 3 to 4 after step 2"), ([whole[0], stage("a", 2, 4)], "'a'"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=re.escape(words)):
            checked(stages, 4)
