"""Intervals: Wilson against tabulated values, the bootstrap against its own coverage."""

import numpy as np
import pytest

from molora_jax.evaluation import intervals


@pytest.mark.parametrize(
    ("right", "n", "low", "high"), [(0, 10, 0.0, 0.27753), (5, 10, 0.23659, 0.76341), (16, 16, 0.80639, 1.0)]
)
def test_wilson(right, n, low, high):
    np.testing.assert_allclose(intervals.wilson(right, n), [right / n, low, high], atol=2e-5)


def test_the_ratio_is_of_sums_and_its_interval_is_seeded():
    sums, counts = np.array([1.0, 30.0, 2.0]), np.array([1.0, 10.0, 4.0])
    value, low, high = intervals.ratio(sums, counts)
    assert value == pytest.approx(33 / 15) and low <= value <= high
    assert intervals.ratio(sums, counts) == [value, low, high]
    assert intervals.ratio(np.array([3.0]), np.array([2.0])) == [1.5, 1.5, 1.5]


def test_coverage_of_the_bootstrap():
    rng, hits, n = np.random.default_rng(1), 0, 40
    for _ in range(100):
        counts = rng.integers(2, 12, n).astype(float)
        _, low, high = intervals.ratio(counts * 2.0 + rng.normal(0, 3, n), counts)
        hits += low <= 2.0 <= high
    assert 85 <= hits <= 100


def test_a_paired_change_is_tighter_than_its_parts():
    rng = np.random.default_rng(2)
    counts = rng.integers(2, 12, 32).astype(float)
    before = counts * rng.uniform(1, 5, 32)
    _, low, high = intervals.ratio_change(before, before - 0.5 * counts, counts)
    assert low == pytest.approx(-0.5) and high == pytest.approx(-0.5)
