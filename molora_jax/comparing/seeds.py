"""What a few seeds say of a setting, and how sure it is that the best one is.

    interval of a setting    mean +- t_{0.975, n-1} s / sqrt(n) over its n seeds; none of one seed
    difference of two        the same of d_s = a_s - b_s over the seeds that both have: equal seeds draw equal rows
    sure                     1 - sum over the other settings of p, one-sided paired t-tests that the best is not lower

The sum (Bonferroni's bound) makes `sure` a lower bound; seeds are the one source of chance that it knows of: held-out
rows are the same in all runs. Lower values are better.
"""

import dataclasses

import numpy as np
from scipy import special


@dataclasses.dataclass(frozen=True)
class Best:
    """`name` of the setting, its `rival` (the least certain one), the paired `difference [value, low, high]` to it
    (best minus rival), `sure`: None where fewer than two seeds tell."""

    name: str
    rival: str | None
    difference: list | None
    sure: float | None


def interval(values) -> list:
    """`[mean, low, high]` at 95 %, bounds None for a single value.

    >>> [round(x, 3) for x in interval([1.0, 2.0, 3.0])]
    [2.0, -0.484, 4.484]
    """
    values = np.asarray(values, np.float64)
    mean = float(values.mean())
    if len(values) < 2:
        return [mean, None, None]
    half = float(special.stdtrit(len(values) - 1, 0.975) * values.std(ddof=1) / np.sqrt(len(values)))
    return [mean, mean - half, mean + half]


def difference(a: dict, b: dict) -> tuple[list | None, float | None]:
    """`([value, low, high], p)` of a minus b over the keys that both have; p: that a is not lower, one-sided.

    >>> difference({0: 1.0, 1: 2.0}, {0: 2.0, 1: 3.0})
    ([-1.0, -1.0, -1.0], 0.0)
    """
    d = np.array([a[seed] - b[seed] for seed in a if seed in b], np.float64)
    if not len(d):
        return None, None
    told = interval(d)
    if len(d) < 2:
        return told, None
    if np.ptp(d) == 0:
        return told, 0.0 if d[0] < 0 else 1.0 if d[0] > 0 else 0.5
    return told, float(special.stdtr(len(d) - 1, d.mean() / (d.std(ddof=1) / np.sqrt(len(d)))))


def best(settings: dict[str, dict]) -> Best | None:
    """Of `{setting: {seed: value}}` the one of the lowest mean; None where no setting has a value."""
    means = {name: float(np.mean(list(values.values()))) for name, values in settings.items() if values}
    if not means:
        return None
    first = min(means, key=means.get)
    found = {name: difference(settings[first], settings[name]) for name in means if name != first}
    if not found:
        return Best(first, None, None, None)
    unsure = {name: 1.0 if p is None else p for name, (_, p) in found.items()}
    rival = max(unsure, key=lambda name: (unsure[name], -means[name]))
    known = all(p is not None for _, p in found.values())
    return Best(first, rival, found[rival][0], max(0.0, 1 - sum(unsure.values())) if known else None)
