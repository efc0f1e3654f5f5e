"""Bigrams and trigrams with interpolated Kneser-Ney smoothing: what the base has to beat.

    p_n(w | h) = max(c(h w) - d, 0) / c(h) + d N(h .) / c(h) p_{n-1}(w | h'),    p_0 = 1 / V

c counts occurrences at the highest order, below it the different words that stand before; N(h .) is how many different
words follow; d = n_1 / (n_1 + 2 n_2) of each order (Kneser & Ney 1995; Chen & Goodman 1998, section 2.7).
"""

import numpy as np


class KneserNey:
    """An `order`-gram model of rows of token ids below `vocabulary`; nothing is predicted across rows."""

    def __init__(self, rows, *, order: int, vocabulary: int):
        self.order, self.V = order, vocabulary
        grams = np.concatenate([self._keys(np.asarray(row, np.int64), order) for row in rows])
        keys, counts = np.unique(grams, return_counts=True)
        self.levels = [self._level(keys, counts)]
        for n in range(order - 1, 0, -1):
            # a key without its first token; as often as different tokens stand before it
            keys, counts = np.unique(keys % self.V**n, return_counts=True)
            self.levels.append(self._level(keys, counts))

    def _keys(self, ids, n: int):
        out = np.zeros(max(len(ids) - n + 1, 0), np.int64)
        for i in range(n):
            out = out * self.V + ids[i : i + len(out)]
        return out

    def _level(self, keys, counts):
        once, twice = (int((counts == k).sum()) for k in (1, 2))
        heads, first, types = np.unique(keys // self.V, return_index=True, return_counts=True)
        return dict(
            keys=keys, counts=counts, heads=heads, types=types, totals=np.add.reduceat(counts, first),
            discount=once / (once + 2 * twice) if once else 0.5,
        )  # fmt: skip

    def nll(self, ids) -> np.ndarray:
        """Nats of every id but the first, `[n - 1]`; the first of them has shorter histories."""
        ids = np.asarray(ids, np.int64)
        p = np.full(len(ids) - 1, 1.0 / self.V)
        for n in range(1, self.order + 1):
            keys = self._keys(ids, n)[1 if n == 1 else 0 :]
            level, skip = self.levels[self.order - n], len(p) - len(keys)
            p[skip:] = self._mixed(level, keys, p[skip:])
        return -np.log(p)

    def _mixed(self, level, keys, lower):
        count, there = _found(level["keys"], level["counts"], keys)
        total, known = _found(level["heads"], level["totals"], keys // self.V)
        types, _ = _found(level["heads"], level["types"], keys // self.V)
        d, total = level["discount"], np.maximum(total, 1)
        mixed = np.where(there, np.maximum(count - d, 0.0), 0.0) / total + d * types / total * lower
        return np.where(known, mixed, lower)


def _found(keys, values, wanted):
    """`(values at the wanted keys, 0 where there are none; whether there are)`; keys are sorted."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    there = keys[at] == wanted
    return np.where(there, values[at], 0), there
