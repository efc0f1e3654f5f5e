"""Sampling filters against transformers' (`tests/fixtures/make_sampling.py`), and their use in generation."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from molora_jax.decode import generate as decoding
from molora_jax.decode import sampling
from molora_jax.errors import InputError
from tests.tiny import tiny_model

FIXTURE = json.loads((pathlib.Path(__file__).parents[1] / "fixtures" / "sampling.json").read_text())
PROMPTS = [[5, 6, 7], list(range(40, 75)), [9]]


@pytest.mark.parametrize("row", FIXTURE["rows"], ids=lambda row: json.dumps(row["case"]))
def test_filters_leave_what_transformers_leaves(row):
    case = dict(row["case"])
    temperature = case.pop("temperature", 1.0)
    filters = sampling.settings(temperature=temperature, **case)
    z, text = jnp.asarray(FIXTURE["logits"], jnp.float32), jnp.asarray(FIXTURE["text"])
    if "repetition_penalty" in filters:
        seen = sampling.seen_in(jnp.pad(text, ((0, 0), (0, 4))), jnp.full(3, 12), z.shape[1])
        z = sampling.penalised(z, seen, filters["repetition_penalty"])
    got = np.asarray(sampling.filtered(z / temperature, filters))
    want = np.array([[-np.inf if x is None else x for x in line] for line in row["logits"]])
    np.testing.assert_array_equal(np.isinf(got), np.isinf(want))
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("top_p", 0.0), ("top_p", 1.1), ("top_p", float("nan")), ("top_p", "much"), ("top_k", -1), ("top_k", 2.5),
        ("top_k", True), ("min_p", 1.0), ("min_p", -0.1), ("repetition_penalty", 0.0), ("repetition_penalty", 1e9),
    ],
)  # fmt: skip
def test_bad_settings(name, value):
    with pytest.raises(InputError, match=name):
        sampling.settings(temperature=1.0, **{name: value})


@pytest.mark.parametrize("name", list(sampling.RANGES))
def test_an_integer_that_no_float_holds(name):
    with pytest.raises(InputError, match=f"{name}: got an integer of 16,610 bits"):
        sampling.settings(temperature=1.0, **{name: 10**5000})


def test_a_filter_of_draws_needs_draws():
    with pytest.raises(InputError, match="temperature 0"):
        sampling.settings(temperature=0.0, top_p=0.9)
    assert sampling.settings(temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0) == {}


@pytest.fixture(scope="module")
def made():
    return tiny_model("base")


def generate(made, **options):
    options = dict(max_new_tokens=24, eos_id=None) | options
    return decoding.generate(*made, PROMPTS, **options)


def test_top_k_of_one_is_the_likeliest(made):
    greedy = generate(made)
    assert generate(made, temperature=2.0, top_k=1) == greedy == generate(made, temperature=2.0, min_p=0.99999)
    assert generate(made, temperature=2.0) != greedy


def test_a_penalty_for_repeats_gives_others(made):
    """As strong as it may be, no token of prompt or answer comes again before all others have."""
    for prompt, answer in zip(PROMPTS, generate(made, repetition_penalty=1000.0), strict=True):
        assert len(set(answer)) == len(answer) and not set(answer) & set(prompt)


def test_stops_and_ends(made):
    """A stop ends a row where `stop` says, at any place; several end ids end it at the first; without, all stays."""
    plain = generate(made)
    assert generate(made, stop=lambda ids: None) == plain
    for at in (1, 7, 8, 9, 17, 24):
        wanted = plain[1][:at]
        got = generate(made, stop=lambda ids, wanted=wanted: len(wanted) if ids[: len(wanted)] == wanted else None)
        assert got[1] == wanted
        same = [answer for answer in plain if answer[:at] != wanted]
        assert [answer for answer in got if answer[:at] != wanted] == same
    for ends in ([plain[0][3], plain[0][9]], plain[0][3]):
        ended = generate(made, eos_id=ends)
        ids = {ends} if isinstance(ends, int) else set(ends)
        for row, whole in zip(ended, plain, strict=True):
            first = next((i for i, token in enumerate(whole) if token in ids), len(whole) - 1)
            assert row == whole[: first + 1]


def test_draws_with_a_stop_are_the_same_draws(made):
    options = dict(temperature=1.3, top_p=0.9, repetition_penalty=1.2, seed=4)
    assert generate(made, stop=lambda ids: None, **options) == generate(made, **options)
