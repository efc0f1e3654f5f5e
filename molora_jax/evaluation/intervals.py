"""95 % intervals over held-out items, as `[value, low, high]`.

    NLL per token    sum nll / sum tokens; percentile bootstrap over items (ratio of sums in every resample), seeded
    exact match      k / n; Wilson's score interval, which stays in [0, 1] and has a width at k = 0 and k = n

n items, R resamples.
"""

import math

import numpy as np

RESAMPLES = 2000
Z = 1.959964


def _weights(n: int) -> np.ndarray:
    """How often each item is drawn, `[R, n]`; the same draws for every quantity of the same n, so that they pair."""
    return np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)


def _interval(value, samples) -> list[float]:
    low, high = np.percentile(samples, [2.5, 97.5])
    return [float(value), float(low), float(high)]


def ratio(sums: np.ndarray, counts: np.ndarray) -> list[float]:
    """`sums [n]` over `counts [n]`, both per item."""
    draws = _weights(len(sums))
    return _interval(sums.sum() / counts.sum(), (draws @ sums) / (draws @ counts))


def ratio_change(before: np.ndarray, after: np.ndarray, counts: np.ndarray) -> list[float]:
    """The paired change of a ratio: items that are hard for one model are hard for the other."""
    return ratio(after - before, counts)


def wilson(right: float, n: int) -> list[float]:
    p, z2 = right / n, Z * Z
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return [p, max(0.0, middle - half), min(1.0, middle + half)]
