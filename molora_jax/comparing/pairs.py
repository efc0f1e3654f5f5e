"""Two runs on the same held-out items: the difference of their numbers, item by item, with 95 % intervals.

    NLL       sum(nll_b - nll_a) / sum(tokens) over the common items; percentile bootstrap over items (`intervals.py`)
    accuracy  p_b - p_a; Newcombe's interval for paired proportions (1998, method 10, by Wilson's intervals and phi)

Items that are hard for one run are hard for the other: the paired interval is narrower than that of two runs apart.
"""

import math

import numpy as np

from molora_jax.evaluation import intervals


def common(a: dict, b: dict) -> tuple[list[int], list[int]]:
    """Places of the items that both columns `row` have, in the order of a's."""
    place = {row: i for i, row in enumerate(b["row"])}
    both = [(i, place[row]) for i, row in enumerate(a["row"]) if row in place]
    return [i for i, _ in both], [j for _, j in both]


def nll_change(a: dict, b: dict) -> list | None:
    """`[value, low, high]` of b minus a; None without a common item, or where the two count other tokens in it."""
    i, j = common(a, b)
    if not i or [a["tokens"][x] for x in i] != [b["tokens"][y] for y in j]:
        return None
    before, after = np.array(a["nll"])[i], np.array(b["nll"])[j]
    return intervals.ratio_change(before, after, np.array(a["tokens"])[i])


def mean_change(a: dict, b: dict, *, resamples: int = 2000) -> list | None:
    """The same of the mean over tasks; a and b `{task: columns}`. Each task is resampled by itself."""
    rng, draws, value = np.random.default_rng(0), [], []
    for task in a:
        i, j = common(a[task], b.get(task, {"row": []}))
        if not i:
            continue
        if nll_change(a[task], b[task]) is None:
            return None
        change = np.array(b[task]["nll"])[j] - np.array(a[task]["nll"])[i]
        count, n = np.array(a[task]["tokens"])[i], len(i)
        weights = rng.multinomial(n, np.full(n, 1 / n), size=resamples)
        value.append(change.sum() / count.sum())
        draws.append((weights @ change) / (weights @ count))
    if not value:
        return None
    low, high = np.percentile(np.mean(draws, axis=0), [2.5, 97.5])
    return [float(np.mean(value)), float(low), float(high)]


def right_change(a: dict, b: dict) -> list | None:
    """`[value, low, high]` of the accuracy of b minus that of a, over the items that both have answered."""
    i, j = common(a, b)
    both = [(a["right"][x], b["right"][y]) for x, y in zip(i, j, strict=True)]
    both = [(x, y) for x, y in both if x is not None and y is not None]
    return None if not both else newcombe(np.array([x for x, _ in both]), np.array([y for _, y in both]))


def newcombe(x: np.ndarray, y: np.ndarray) -> list[float]:
    """`[d, low, high]` of mean(y) - mean(x), paired entries from 0 to 1.

    >>> ones, zeros = np.ones(36), np.zeros(12)          # Newcombe's example 36, 12, 2, 0: p1 0.96, p2 0.76
    >>> x, y = np.concatenate([ones, zeros, [1, 1]]), np.concatenate([ones, zeros + 1, [0, 0]])
    >>> [round(v, 4) for v in newcombe(x, y)]
    [0.2, 0.0569, 0.3404]
    """
    n, p1, p2 = len(x), float(np.mean(x)), float(np.mean(y))
    _, l1, u1 = intervals.wilson(p1 * n, n)
    _, l2, u2 = intervals.wilson(p2 * n, n)
    spread, joint = math.sqrt(p1 * (1 - p1) * p2 * (1 - p2)), float(np.mean(x * y) - p1 * p2)
    joint = max(joint - 1 / (2 * n), 0.0) if joint > 0 else joint  # his correction for continuity
    phi = 0.0 if spread == 0 else joint / spread
    d = p2 - p1

    def half(down, up):
        return math.sqrt(max(down * down - 2 * phi * down * up + up * up, 0.0))

    return [d, d - half(p2 - l2, u1 - p1), d + half(u2 - p2, p1 - l1)]
