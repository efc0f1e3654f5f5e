"""What DP-SGD spends: Renyi differential privacy of the Gaussian mechanism on a Poisson sample.

    A(a) = E_{z ~ N(0, s^2)} [ (1 - q + q exp((2 z - 1) / (2 s^2)))^a ],     rdp(a) = T log A(a) / (a - 1)
    epsilon = min_a rdp(a) + log((a - 1) / a) - (log delta + log a) / (a - 1)

(Mironov, Talwar, Zhang 2019, arXiv 1908.10530; the conversion of Canonne, Kamath, Steinke 2020, arXiv 2004.00010.) A
is integrated numerically, so that the order a may be any number above 1. q: the probability with which an example is
drawn, s: the noise over the clipping norm, T: steps. Neighbours differ by one example that is there or not.
"""

import functools
import math

import numpy as np

ORDERS = (*(1 + x / 20 for x in range(1, 40)), *(3 + x / 4 for x in range(28)), *range(10, 64), *range(64, 257, 16))


@functools.lru_cache(maxsize=256)
def rdp(q: float, sigma: float, order: float) -> float:
    """Of one step."""
    if q == 0:
        return 0.0
    if q == 1:
        return order / (2 * sigma**2)
    z = np.linspace(-14 * sigma, order + 14 * sigma, int((order / sigma + 28) * 60) + 1)
    ratio = np.logaddexp(math.log1p(-q), math.log(q) + (2 * z - 1) / (2 * sigma**2))
    logs = order * ratio - z**2 / (2 * sigma**2) - math.log(sigma * math.sqrt(2 * math.pi)) + math.log(z[1] - z[0])
    top = logs.max()
    return max(0.0, float(top + math.log(np.exp(logs - top).sum())) / (order - 1))


def epsilon(q: float, sigma: float, steps: int, delta: float) -> float:
    """Spent after so many steps; infinite without noise."""
    if steps == 0:
        return 0.0
    if sigma == 0:
        return math.inf
    found = (steps * rdp(q, sigma, a) + math.log1p(-1 / a) - (math.log(delta) + math.log(a)) / (a - 1) for a in ORDERS)
    return max(0.0, min(found))


@functools.lru_cache(maxsize=16)  # asked for at the end of every round
def noise_for(target: float, q: float, steps: int, delta: float) -> float:
    """The smallest sigma (to 1e-3 of itself, rounded up) that spends at most `target`."""
    low, high = 0.0, 1.0
    while epsilon(q, high, steps, delta) > target:
        low, high = high, 2 * high
        if high > 1e5:
            raise ValueError(f"no noise below {high} spends at most {target}")
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if epsilon(q, max(middle, 1e-2), steps, delta) > target else (low, middle)
    return high


def most_drawn(count: int, q: float, chance: float) -> int:
    """The fewest places that a Poisson sample of `count` examples overflows with at most this chance."""
    if q >= 1:
        return count
    k = np.arange(count + 1)
    log_choose = math.lgamma(count + 1) - np.array([math.lgamma(i + 1) + math.lgamma(count - i + 1) for i in k])
    chances = np.exp(log_choose + k * math.log(q) + (count - k) * math.log1p(-q))
    above = np.cumsum(chances[::-1])[::-1]  # P(drawn >= k)
    fits = np.flatnonzero(np.append(above[1:], 0.0) <= chance)
    return max(1, int(k[fits[0]]))
