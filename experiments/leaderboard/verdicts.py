"""Paired differences between methods, and what may be said of them.

    d_s = NLL of a method - NLL of the other, of one seed s: same batches, same held-out items
    p       two-sided t-test of mean d = 0 over seeds, then Holm's correction over all methods that a table compares
    better  p < 0.05 and mean d < 0            worse   p < 0.05 and mean d > 0
    equal   else, where the 95 % interval lies inside +-MARGIN
    open    else: this many seeds cannot tell

Holm (1979): the i-th least of m values is multiplied by m - i + 1, and no later one is less.
"""

import dataclasses
import math
import statistics

from scipy import stats

from experiments.leaderboard.report import t_interval

MARGIN = 0.02  # nats: less is of no interest here
LEVEL = 0.05


@dataclasses.dataclass(frozen=True)
class Difference:
    """`mean`, half `width` of its 95 % interval, raw `p`; NaN where one seed says nothing of them. `items`: half width
    of the interval that another draw of held-out items would give."""

    mean: float
    width: float
    p: float
    seeds: int
    items: float = math.nan


def difference(values, blocks=()) -> Difference | None:
    """Of paired differences by seed; `blocks`: the same differences by block of items, averaged over seeds."""
    if not values:
        return None
    n, (mean, width) = len(values), t_interval(values)
    items = t_interval(blocks)[1] if len(blocks) else math.nan
    if n < 2:
        return Difference(mean, width, math.nan, n, items)
    error = statistics.stdev(values) / math.sqrt(n)
    p = 2 * float(stats.t.sf(abs(mean) / error, n - 1)) if error else float(mean == 0)
    return Difference(mean, width, p, n, items)


def holm(values: dict[str, float]) -> dict[str, float]:
    """Corrected p values; NaN stays, and does not count."""
    known = sorted((p, name) for name, p in values.items() if not math.isnan(p))
    out, least = dict.fromkeys(values, math.nan), 0.0
    for i, (p, name) in enumerate(known):
        least = max(least, min(1.0, p * (len(known) - i)))
        out[name] = least
    return out


def verdicts(found: dict[str, Difference | None]) -> dict[str, str]:
    """`{name: better, worse, equal, open}` of all methods of a table, corrected together; "" without a difference."""
    corrected = holm({name: d.p if d else math.nan for name, d in found.items()})
    return {name: _verdict(d, corrected[name]) if d else "" for name, d in found.items()}


def _verdict(d: Difference, p: float) -> str:
    if not math.isnan(p) and p < LEVEL:
        return "better" if d.mean < 0 else "worse"
    return "equal" if not math.isnan(d.width) and abs(d.mean) + d.width <= MARGIN else "open"
