"""Intervals over seeds and paired differences, against scipy and published examples; examples of docstrings."""

import doctest

import numpy as np
import pytest
from scipy import stats

from molora_jax import pictures
from molora_jax.comparing import facts, pairs, seeds
from molora_jax.training import collapse, patience


@pytest.mark.parametrize("module", [seeds, pairs, facts, pictures, collapse, patience], ids=lambda m: m.__name__)
def test_examples_of_docstrings(module):
    failed, tried = doctest.testmod(module, extraglobs=dict(np=np))
    assert tried and not failed


def test_intervals_over_seeds_are_those_of_scipy():
    a, b = {0: 1.31, 1: 1.28, 2: 1.35, 3: 1.30}, {0: 1.36, 1: 1.37, 2: 1.38, 3: 1.31, 4: 9.0}
    values = list(a.values())
    told = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    np.testing.assert_allclose(seeds.interval(values), [np.mean(values), *told], rtol=1e-6)
    d, p = seeds.difference(a, b)  # over the four seeds that both have
    paired = stats.ttest_rel(values, [b[s] for s in a], alternative="less")
    np.testing.assert_allclose(p, paired.pvalue, rtol=1e-6)
    low, high = stats.ttest_rel(values, [b[s] for s in a]).confidence_interval()
    np.testing.assert_allclose(d[1:], [low, high], rtol=1e-6)
    assert seeds.interval([2.0]) == [2.0, None, None]


def test_how_sure_the_best_is():
    close, far = {0: 1.0, 1: 1.2, 2: 1.1}, {0: 2.0, 1: 2.2, 2: 2.15}
    near = {0: 1.05, 1: 1.19, 2: 1.13}
    found = seeds.best({"a": close, "b": near, "c": far, "failed": {}})
    _, p = seeds.difference(close, near)
    _, q = seeds.difference(close, far)
    assert (found.name, found.rival) == ("a", "b") and found.sure == pytest.approx(1 - p - q)
    assert seeds.best({"a": {0: 1.0}, "b": {0: 2.0}}).sure is None, "one seed does not tell"
    assert seeds.best({"a": {0: 1.0}}).rival is None and seeds.best({"a": {}}) is None


def of(a, b, c, d):
    """Columns of a table: both right, the second alone, the first alone, none."""
    return np.repeat([1.0, 0.0, 1.0, 0.0], [a, b, c, d]), np.repeat([1.0, 1.0, 0.0, 0.0], [a, b, c, d])


@pytest.mark.parametrize(
    ("table", "published"),
    [
        ((36, 12, 2, 0), (0.2, 0.0569, 0.3404)),  # Newcombe 1998 (Stat. Med. 17, 2635), method 10
        ((14, 5, 0, 22), (0.122, 0.011, 0.226)),  # Altman et al., Statistics with confidence, table 6.2
    ],
)
def test_paired_proportions_as_published(table, published):
    digits = 3 if published[0] == 0.122 else 4
    assert [round(v, digits) for v in pairs.newcombe(*of(*table))] == list(published)


def test_paired_proportions_cover_and_have_a_width_without_a_difference():
    rng, hits = np.random.default_rng(0), 0
    for _ in range(400):
        base = rng.random(16) < 0.6
        x, y = base ^ (rng.random(16) < 0.1), base ^ (rng.random(16) < 0.2)
        truth = 0.6 * 0.8 + 0.4 * 0.2 - (0.6 * 0.9 + 0.4 * 0.1)
        _, low, high = pairs.newcombe(x.astype(float), y.astype(float))
        hits += low <= truth <= high
    assert hits / 400 > 0.93
    _, low, high = pairs.newcombe(np.ones(16), np.ones(16))
    assert low < -0.1 and high > 0.1


def test_differences_are_of_common_items_alone():
    a = dict(row=["x", "y", "z"], nll=[1.0, 2.0, 3.0], tokens=[1, 2, 3], right=[1.0, 0.0, None])
    b = dict(row=["z", "y", "w"], nll=[4.5, 2.2, 9.0], tokens=[3, 2, 1], right=[1.0, 1.0, 1.0])
    assert pairs.common(a, b) == ([1, 2], [1, 0])
    assert pairs.nll_change(a, b)[0] == pytest.approx((0.2 + 1.5) / 5)
    assert pairs.right_change(a, b)[0] == 1.0, "y alone has two answers"
    assert pairs.nll_change(a, b | dict(tokens=[3, 3, 1])) is None, "another tokenizer"
    assert pairs.nll_change(a, dict(row=["q"], nll=[1.0], tokens=[1], right=[1.0])) is None
    assert pairs.mean_change({"t": a}, {"t": b})[0] == pytest.approx(pairs.nll_change(a, b)[0])


def test_smoothing_is_the_plain_mean_of_what_is_finite():
    values = np.random.default_rng(0).random(200)
    values[[3, 77]] = np.nan
    width = 13
    plain = [np.nanmean(values[max(i - 6, 0) : i + 7]) for i in range(200)]
    np.testing.assert_allclose(pictures.smoothed(values), plain, rtol=1e-9)
    assert width == 200 // 15 | 1
    assert np.isnan(pictures.smoothed([np.nan, np.nan], 3)).all() and pictures.smoothed([]).size == 0
