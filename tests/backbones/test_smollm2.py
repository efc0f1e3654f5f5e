"""The default base model against an independent implementation (`tests/fixtures/make_smollm2_logits.py`)."""

import pathlib

import numpy as np
import pytest

from configs import common
from molora_jax.backbones.families import SMOLLM2
from molora_jax.decode.generate import generate
from molora_jax.evaluation.run import load_base_run

FIXTURE = pathlib.Path(__file__).parents[1] / "fixtures" / "smollm2_logits.npz"
QUESTION = "What is the capital of France?"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run():
    return load_base_run(common.get_config())


@pytest.fixture(scope="module")
def fixture():
    return np.load(FIXTURE)


def test_its_shape_is_the_one_that_counts_use(run):
    assert run.model.config == SMOLLM2


def test_logits_match_torch_to_1e_3(run, fixture):
    tokens = fixture["prompt"][None]
    assert run.prompt_ids(QUESTION) == fixture["prompt"].tolist()
    batch = dict(
        tokens=tokens, segment_ids=np.ones_like(tokens), positions=np.arange(tokens.shape[1], dtype=np.int32)[None]
    )
    hidden = run.model.hidden(run.params, {}, {}, batch)[0]
    logits = np.asarray(run.model.logits(run.params, hidden))[0]
    np.testing.assert_allclose(logits[-1], fixture["last"], atol=1e-3)
    top = np.take_along_axis(logits, fixture["top_ids"], axis=-1)
    np.testing.assert_allclose(top, fixture["top_logits"], atol=1e-3)


@pytest.mark.parametrize("cache", [True, False])
def test_greedy_answer_is_the_same_ids(run, fixture, cache):
    (ids,) = generate(
        run.model, run.params, {}, {}, [fixture["prompt"].tolist()], max_new_tokens=24, eos_id=run.tokenizer.eos_id,
        cache=cache,
    )  # fmt: skip
    assert ids == fixture["greedy"].tolist()


def test_paris(run):
    assert run.generate(QUESTION) == "The capital of France is Paris."
    answers = run.generate([QUESTION, "Say yes.", QUESTION], max_new_tokens=12)
    assert answers[0] == answers[2] == "The capital of France is Paris."
