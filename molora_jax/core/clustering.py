"""k-means (Lloyd) of few points in many dimensions, float64 on the host; the result depends on the points alone.

    minimise sum_i ||x_i - c_{l(i)}||^2;   starts: k-means++ (Arthur and Vassilvitskii 2007), the best of several

The points are put in an order of their own content first, so that neither their order nor who gave them matters.
N points, D dimensions, K clusters.
"""

import numpy as np


def by_content(points: np.ndarray) -> np.ndarray:
    """A permutation `[N]` into an order that the values alone decide."""
    rows = np.ascontiguousarray(points)
    return np.array(sorted(range(len(rows)), key=lambda i: rows[i].tobytes()), int)


def kmeans(
    points: np.ndarray, k: int, *, seed: int = 0, starts: int = 8, most: int = 100, signs: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """`(labels, sign)` of the points `[N, D]`: the cluster, int in `0 .. K - 1`, K = min(k, N), and 1 or -1.

    A cluster that loses all its points takes the point farthest from its own centre. With fewer different points than
    clusters some stay empty. `signs`: x and -x are the same point, and `sign` says as which one it is near its centre;
    without, it is 1.
    """
    N = len(points)
    if k >= N:
        return np.arange(N), np.ones(N)
    order = by_content(points)
    x, rng, best = points[order].astype(np.float64), np.random.default_rng(seed), None
    for _ in range(starts):
        labels, sign, cost = _lloyd(x, _spread(x, k, rng, signs), most, signs)
        if best is None or cost < best[2] * (1 - 1e-12):
            best = labels, sign, cost
    labels, sign = np.empty(N, int), np.empty(N)
    labels[order], sign[order] = best[:2]
    return labels, sign


def _squares(x, centre, signs):
    """Squared distances `[N]`: as differences, so that equal points are exactly 0 apart."""
    own = np.sum((x - centre) ** 2, axis=1)
    return np.minimum(own, np.sum((x + centre) ** 2, axis=1)) if signs else own


def _spread(x, k, rng, signs):
    """k-means++: each new centre is a point, drawn with its squared distance to the centres so far."""
    centres = [x[rng.integers(len(x))]]
    near = _squares(x, centres[0], signs)
    for _ in range(k - 1):
        total = near.sum()
        pick = rng.choice(len(x), p=near / total) if total > 0 else rng.integers(len(x))
        centres.append(x[pick])
        near = np.minimum(near, _squares(x, x[pick], signs))
    return np.stack(centres)


def _lloyd(x, centres, most, signs):
    labels, sign = None, np.ones(len(x))
    for _ in range(most):
        far = np.stack([_squares(x, centre, signs) for centre in centres])  # [K, N]
        new = np.argmin(far, axis=0)
        own = far[new, np.arange(len(x))]
        for empty in sorted(set(range(len(centres))) - set(new.tolist())):
            worst = int(np.argmax(own))
            if own[worst] > 0:
                new[worst], own[worst] = empty, 0.0
        if labels is not None and np.array_equal(new, labels):
            break
        labels = new
        if signs:
            sign = np.where(np.sum(x * centres[labels], axis=1) < 0, -1.0, 1.0)
        for c in set(labels.tolist()):
            at = labels == c
            centres[c] = (sign[at, None] * x[at]).mean(axis=0)
    return labels, sign, float(own.sum())
