"""Local routing consistency: how well a few experts serve a run of consecutive tokens (arXiv 2505.16056).

A trace is what one layer's router chose along one sequence: `[n, K]` ids of experts in the router's order, -1 where a
token uses fewer. With `f[p, e]` the uses of expert e in the m tokens from p on (every p: segments overlap):

    SRP   the best F1 of a guess that says "all m tokens" or "none" of each segment and expert; the best guess is a
          threshold on f:  max over a of  2 sum(f | f >= a) / (m #(f >= a) + sum f),  one a for the whole group
    SCH   the hit rate of a cache of C experts that evicts the one least used in the next m tokens (ties: used longest
          ago) and always takes the expert that is needed

Both are bounds for a router, no speed that was reached: they say whether experts could be kept off the device. Shared
experts, which every token uses, are not to be in a trace.
"""

import dataclasses

import numpy as np
from scipy import stats

from molora_jax.errors import InputError

POLICIES = ("lru", "lfu", "belady", "fixed")


@dataclasses.dataclass(frozen=True)
class SRP:
    """A value and what it is to be compared with.

    `value` is in [0, 1]. `threshold`: the least f of a segment that the best guess calls used. `size_ratio`: the mean
    size of the guessed sets over the mean number of experts of a token; near 1 is good. `balanced`, `permuted`: the
    value of routing without any memory, over equally used experts and at the loads of these traces. A router is
    consistent as far as it is above the second.
    """

    value: float
    threshold: int
    size_ratio: float
    balanced: float
    permuted: float


def trace(gates) -> np.ndarray:
    """The trace of gates `[n, E]` (0: not used), largest gate first.

    >>> trace([[0.0, 0.3, 0.7], [1.0, 0.0, 0.0]]).tolist()
    [[2, 1], [0, -1]]
    """
    gates = np.asarray(gates)
    order = np.argsort(-gates, axis=-1, kind="stable")
    used = np.take_along_axis(gates, order, -1) > 0
    return np.where(used, order, -1)[:, : max(1, int(used.sum(-1).max(initial=0)))]


def srp(traces, experts: int, segment: int = 16) -> SRP:
    """Of a group: all experts of all traces, under one threshold.

    The traces of one layer give that layer's value, those of all layers the model's.

    Args:
      traces: each `[n, K]`; one shorter than a segment has none. experts: E. segment: m tokens.

    Raises:
      InputError: no segment at all, ids that are no experts.

    >>> srp([np.zeros((40, 1), int)], experts=4).value                # one expert for every token
    1.0
    >>> srp([np.arange(40)[:, None] // 20], experts=2, segment=4).value > 0.95
    True
    """
    counts, uses, tokens = _histogram(traces, experts, segment)
    counts = counts.sum(0)
    value, threshold = _best(counts, segment)
    grid, load = np.arange(segment + 1), uses / tokens
    predicted, all_uses = counts[threshold:].sum(), (counts * grid).sum()
    return SRP(
        value=value,
        threshold=threshold,
        size_ratio=float(segment * predicted / all_uses) if all_uses else 0.0,
        balanced=_best(stats.binom.pmf(grid, segment, load.mean()), segment)[0],
        permuted=_best(stats.binom.pmf(grid, segment, load[:, None]).sum(0), segment)[0],
    )


def srp_of_experts(traces, experts: int, segment: int = 16) -> np.ndarray:
    """`[E]`: each expert with a threshold of its own; 0 for one that is never used. Their mean is not the group's."""
    counts, *_ = _histogram(traces, experts, segment)
    return np.array([_best(of_one, segment)[0] for of_one in counts])


def of_run(run, texts, segment: int = 16) -> dict[str, dict[str, list[SRP | None]]]:
    """`Run.consistency`."""
    if isinstance(texts, str) or not len(texts):
        raise InputError("texts", got=repr(texts)[:80], expected="a list of texts")
    traces: dict = {}
    for text in texts:
        for rule, scopes in run.routing(text).items():
            for scope, layers in scopes.items():
                own = traces.setdefault(rule, {}).setdefault(scope, [[] for _ in layers])
                for of_layer, gates in zip(own, layers, strict=True):
                    of_layer.append(trace(gates))
    out: dict = {}
    for rule in run.model.rules:
        for scope, layers in traces.get(rule.name, {}).items():
            counts = [max(rule.experts)] if scope == "model" else rule.experts
            if rule.placement is not None:
                counts = [n and rule.placement.choices(rule, run.model.config, n) for n in counts]
            found = [srp(own, n, segment) if n else None for own, n in zip(layers, counts, strict=True)]
            out.setdefault(rule.name, {})[scope] = found
    return out


def _histogram(traces, experts, segment):
    """`([E, m + 1] segments by f, [E] uses, tokens)`."""
    if segment < 1:
        raise InputError("segment", got=segment, expected="at least 1 token")
    counts, uses, tokens = np.zeros((experts, segment + 1), np.int64), np.zeros(experts), 0
    for ids in _checked(traces, experts):
        f = segment_uses(ids, experts, segment)
        np.add.at(counts, (np.broadcast_to(np.arange(experts), f.shape), f), 1)
        uses, tokens = uses + np.bincount(ids[ids >= 0], minlength=experts), tokens + len(ids)
    if not counts.any():
        raise InputError("traces", got="none as long as a segment", expected=f"sequences of at least {segment} tokens")
    return counts, uses, tokens


def segment_uses(ids, experts: int, segment: int) -> np.ndarray:
    """f: `[n - m + 1, E]` int32, the uses of each expert in every segment of a trace."""
    used = np.zeros((len(ids) + 1, experts), np.int32)
    at, _ = np.nonzero(ids >= 0)
    used[at + 1, ids[ids >= 0]] = 1
    total = np.cumsum(used, axis=0, dtype=np.int32)
    return total[segment:] - total[: max(0, len(total) - segment)]


def _best(counts, segment: int) -> tuple[float, int]:
    """The largest F1 over thresholds and the one that has it, of `[m + 1]` segments by f."""
    grid = np.arange(segment + 1)
    predicted = np.cumsum(counts[::-1])[::-1]
    found = np.cumsum((counts * grid)[::-1])[::-1]
    below = segment * predicted + found[0]
    f1 = np.divide(2.0 * found, below, out=np.zeros(segment + 1), where=below > 0)
    return float(f1.max()), int(f1.argmax())


def sch(traces, experts: int, capacities, segment: int = 16) -> np.ndarray:
    """`[capacities]`: hits over uses of a cache that looks `segment` tokens ahead (the paper's current definition).

    All experts of a token are judged before any is brought in. An expert's first use is a hit while fewer than C
    different ones were seen: filling an empty cache is free.

    Args:
      traces: each `[n, K]`; every sequence starts with an empty cache. capacities: numbers of experts C; a number below
        K says little.
    """
    return _simulated(traces, experts, capacities, lambda ids: _LookAhead(ids, experts, segment))


def sch_of_segments(traces, experts: int, capacities, segment: int = 16) -> np.ndarray:
    """`[capacities]`: the paper's first definition: each segment has the C experts that it uses most."""
    capacities = _capacities(capacities, experts)
    hits, all_uses = np.zeros(len(capacities)), 0
    for ids in _checked(traces, experts):
        f = -np.sort(-segment_uses(ids, experts, segment), axis=1)
        hits, all_uses = hits + np.cumsum(f.sum(0))[capacities - 1], all_uses + f.sum()
    return _rate(hits, all_uses)


def hit_rates(traces, experts: int, capacities, policy: str) -> np.ndarray:
    """`[capacities]`: hits over uses of a policy, counted as `sch` counts them.

    Args:
      policy: "lru"; "lfu" (uses in this sequence so far, ties by age); "belady" (farthest next use); "fixed" (the C
        experts that the sequence uses most, never another).
    """
    if policy not in POLICIES:
        raise InputError("policy", got=repr(policy), expected=f"one of {', '.join(POLICIES)}")
    if policy == "fixed":
        capacities = _capacities(capacities, experts)
        uses = [-np.sort(-np.bincount(ids[ids >= 0], minlength=experts)) for ids in _checked(traces, experts)]
        return _rate(sum(np.cumsum(u)[capacities - 1] for u in uses), sum(u.sum() for u in uses))
    order = dict(lru=_Recent, lfu=_Frequent, belady=_Belady)[policy]
    return _simulated(traces, experts, capacities, lambda ids: order(ids, experts))


class _Recent:
    """`keys[e]` orders experts: the cached one with the least is evicted."""

    def __init__(self, ids, experts):
        self.keys, self.clock = np.zeros(experts, np.int64), 0

    def use(self, expert):
        self.clock += 1
        self.keys[expert] = self.clock

    def end_token(self):
        pass


class _Frequent(_Recent):
    def use(self, expert):
        self.clock += 1
        self.keys[expert] = (((self.keys[expert] >> 32) + 1) << 32) + self.clock


class _LookAhead:
    """Uses in the tokens i to i + m - 1 that are still to come, then the time of the last use."""

    def __init__(self, ids, experts, segment):
        self.ids, self.next, self.clock = ids, min(segment, len(ids)), 0
        self.uses, self.last = np.zeros(experts, np.int64), np.zeros(experts, np.int64)
        for token in ids[:segment]:
            self.uses[token[token >= 0]] += 1

    @property
    def keys(self):
        return (self.uses << 32) + self.last

    def use(self, expert):
        self.clock += 1
        self.uses[expert] -= 1
        self.last[expert] = self.clock

    def end_token(self):
        if self.next < len(self.ids):
            token = self.ids[self.next]
            self.uses[token[token >= 0]] += 1
            self.next += 1


class _Belady(_Recent):
    def __init__(self, ids, experts):
        super().__init__(ids, experts)
        flat = ids[ids >= 0]
        self.following = np.full(len(flat), len(flat))  # never again
        later = {}
        for at in range(len(flat) - 1, -1, -1):
            self.following[at] = later.get(flat[at], len(flat))
            later[flat[at]] = at

    def use(self, expert):
        self.keys[expert] = -self.following[self.clock]
        self.clock += 1


def _simulated(traces, experts, capacities, policy_of) -> np.ndarray:
    capacities = _capacities(capacities, experts)
    hits, all_uses, rows = np.zeros(len(capacities)), 0, np.arange(len(capacities))
    for ids in _checked(traces, experts):
        policy, cached, seen = policy_of(ids), np.zeros((len(capacities), experts), bool), np.zeros(experts, bool)
        for token in ids:
            token = token[token >= 0]
            for expert in token:  # all are judged before any is brought in
                hits += cached[:, expert] if seen[expert] else seen.sum() < capacities
                seen[expert] = True
            for expert in token:
                full = ~cached[:, expert] & (cached.sum(1) == capacities)
                evicted = np.where(cached, policy.keys, np.iinfo(np.int64).max).argmin(1)
                cached[rows[full], evicted[full]] = False
                cached[:, expert] = True
                policy.use(expert)
            policy.end_token()
            all_uses += len(token)
    return _rate(hits, all_uses)


def _rate(hits, all_uses) -> np.ndarray:
    if not all_uses:
        raise InputError("traces", got="no token that uses an expert", expected="at least one")
    return np.asarray(hits / all_uses, float)


def _capacities(capacities, experts) -> np.ndarray:
    out = np.atleast_1d(np.asarray(capacities, int))
    if not len(out) or out.min() < 1 or out.max() > experts:
        raise InputError("capacities", got=np.asarray(capacities).tolist(), expected=f"1 to {experts} experts")
    return out


def _checked(traces, experts):
    """Each trace as an array of ids."""
    for ids in map(np.asarray, traces):
        if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
            got = f"shape {ids.shape}, {ids.dtype}"
            raise InputError("traces", got=got, expected="ids [tokens, K] of each sequence, integers")
        if ids.size and (ids.min() < -1 or ids.max() >= experts):
            expected = f"-1 (none) or 0 to {experts - 1}"
            raise InputError("traces", got=f"ids {ids.min()} to {ids.max()}", expected=expected)
        yield ids
