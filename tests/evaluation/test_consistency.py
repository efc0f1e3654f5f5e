"""Local routing consistency against the paper's own code (`tests/fixtures/make_routing_consistency.py`), brute force,
and each item of the acceptance list."""

import itertools
import math
import pathlib

import numpy as np
import pytest

from molora_jax.errors import InputError
from molora_jax.evaluation.consistency import (
    POLICIES,
    hit_rates,
    sch,
    sch_of_segments,
    segment_uses,
    srp,
    srp_of_experts,
    trace,
)  # fmt: skip

OFFICIAL = np.load(pathlib.Path(__file__).parents[1] / "fixtures" / "routing_consistency.npz")
CASES = [name.removeprefix("ids_") for name in OFFICIAL.files if name.startswith("ids_")]


def drawn(experts, k, tokens, seed=0, weights=None):
    rng = np.random.default_rng(seed)
    return np.array([rng.choice(experts, k, replace=False, p=weights) for _ in range(tokens)])


def blocks(experts, k, tokens, favourites, seed=0, mass=0.95, length=100):
    """Every `length` tokens another set of favourites gets `mass` of the routing."""
    rng, out = np.random.default_rng(seed), []
    for start in range(0, tokens, length):
        weights = np.full(experts, (1 - mass) / (experts - favourites))
        weights[rng.choice(experts, favourites, replace=False)] = mass / favourites
        out.append(drawn(experts, k, length, seed + start + 1, weights))
    return np.concatenate(out)


@pytest.mark.parametrize("case", CASES)
def test_it_is_what_the_papers_code_says(case):
    ids, experts = OFFICIAL[f"ids_{case}"], int(OFFICIAL[f"experts_{case}"])
    every = range(1, experts + 1)
    for name in (name for name in OFFICIAL.files if name.startswith((f"sch_{case}_", f"srp_{case}_"))):
        kind, _, segment = name.split("_")
        if kind == "sch":
            np.testing.assert_allclose(sch([ids], experts, every, int(segment)), OFFICIAL[name], atol=1e-6)
        else:
            assert srp([ids], experts, int(segment)).value == pytest.approx(float(OFFICIAL[name]), abs=1e-6)
    for policy in ("lru", "lfu", "belady"):
        np.testing.assert_allclose(hit_rates([ids], experts, every, policy), OFFICIAL[f"{policy}_{case}"], atol=1e-6)


@pytest.mark.parametrize(("n", "segment", "seed"), [(6, 2, 0), (8, 3, 1), (9, 4, 2), (10, 4, 3)])
def test_acceptance_1_no_guess_is_better_and_the_threshold_is_its_half(n, segment, seed):
    ids = drawn(3, 1, n, seed)
    for expert in range(3):
        used = (ids == expert).any(1)
        f = np.array([used[p : p + segment].sum() for p in range(n - segment + 1)])
        best = 0.0
        for guess in itertools.product((0, 1), repeat=len(f)):
            below = segment * sum(guess) + f.sum()
            best = max(best, 2 * (f * guess).sum() / below if below else 0.0)
        value = srp_of_experts([ids], 3, segment)[expert]
        assert value == pytest.approx(best)
        threshold = math.ceil(segment / 2 * value - 1e-9)
        chosen = f >= threshold if value else np.zeros(len(f), bool)
        below = segment * chosen.sum() + f.sum()
        assert (2 * f[chosen].sum() / below if below else 0.0) == pytest.approx(value)


def test_acceptance_2_blocks_always_and_never():
    long = np.repeat(np.arange(4), 2000)[:, None]
    assert np.all(srp_of_experts([long], 4, 16)[:4] > 0.98)
    assert srp_of_experts([np.full((100, 1), 2)], 4, 16).tolist() == [0.0, 0.0, 1.0, 0.0]
    found = srp([drawn(16, 2, 20_000)], 16, 16)
    assert found.value == pytest.approx(found.balanced, abs=0.02) and found.permuted == pytest.approx(0.321, abs=0.005)


@pytest.mark.parametrize(("q", "levels"), [(16, (0.431, 0.237, 0.165)), (8, (0.464, 0.321, 0.253)),
                                           (4, (0.565, 0.452, 0.409))])  # fmt: skip
def test_levels_of_routing_without_memory(q, levels):
    for segment, level in zip((4, 16, 64), levels, strict=True):
        assert srp([drawn(q, 1, 200)], q, segment).balanced == pytest.approx(level, abs=1e-3)


def test_acceptance_3_a_group_of_one_and_orders():
    ids = blocks(8, 2, 800, 3)
    one = np.where(ids == 3, 0, -1)
    assert srp([one], 1).value == pytest.approx(srp_of_experts([ids], 8)[3])
    others = np.random.default_rng(0).permutation(8)
    assert srp([others[ids]], 8).value == pytest.approx(srp([ids], 8).value)
    shuffled = np.random.default_rng(0).permutation(ids)
    assert srp([shuffled], 8).value < srp([ids], 8).value - 0.1
    assert srp([shuffled], 8).value == pytest.approx(srp([ids], 8).permuted, abs=0.05)
    assert srp([ids], 8).value != pytest.approx(srp_of_experts([ids], 8).mean(), abs=1e-3), "no mean over experts"


def test_acceptance_4_the_guess_of_everything_has_all_experts():
    found = srp(
        [np.array([[0, 1], [2, 3], [4, 5], [6, 7]])], 8, 2
    )  # used once each: nothing beats guessing all or once
    assert found.threshold <= 1
    ids = drawn(4, 2, 60)
    f = segment_uses(ids, 4, 1)
    assert f.shape == (60, 4) and srp([ids], 4, 1).size_ratio == 1.0
    assert 4 * f.shape[0] / f.sum() == 4 / 2, "at threshold 0 the size ratio is E / K"


def test_acceptance_5_more_room_never_hurts_and_room_for_all_is_all():
    ids = blocks(8, 2, 300, 3)
    rates = sch([ids], 8, range(2, 9))
    assert np.all(np.diff(rates) >= 0) and rates[-1] == 1.0


@pytest.mark.parametrize("make", [lambda: drawn(12, 3, 2000), lambda: blocks(12, 3, 2000, 5)])
def test_acceptance_6_nobody_passes_the_clairvoyant(make):
    ids, room = make(), range(3, 13)
    best = hit_rates([ids], 12, room, "belady")
    assert np.all(hit_rates([ids], 12, room, "lru") <= best)
    for other in (sch([ids], 12, room), hit_rates([ids], 12, room, "lfu"), hit_rates([ids], 12, room, "fixed")):
        assert np.all(other <= best + 0.02)


def test_acceptance_7_the_first_definition_with_room_enough():
    ids = drawn(8, 2, 100)
    assert sch_of_segments([ids], 8, [8], 4) == 1.0  # m K = 8
    assert sch_of_segments([ids], 8, [2], 1) == 1.0
    assert 0 < sch_of_segments([ids], 8, [2], 16)[0] < 1


def test_small_experiment_of_the_specification():
    """64 experts, 8 a token, 2,000 tokens: SRP(16), SCH(16), LRU and Belady at a cache of 16."""
    plain, topics = drawn(64, 8, 2000), blocks(64, 8, 2000, 12)
    for ids, wanted in ((plain, (0.323, 0.437, 0.260, 0.546)), (topics, (0.734, 0.945, 0.933, 0.949))):
        got = [srp([ids], 64).value, *sch([ids], 64, [16]), *hit_rates([ids], 64, [16], "lru"),
               *hit_rates([ids], 64, [16], "belady")]  # fmt: skip
        np.testing.assert_allclose(got, wanted, atol=0.03)


def test_sequences_do_not_run_into_each_other():
    one, other = np.zeros((20, 1), int), np.ones((20, 1), int)
    assert srp([one, other], 2).value == 1.0 > srp([np.concatenate([one, other])], 2).value
    short = np.zeros((3, 1), int)
    assert srp([one, short], 2).value == 1.0, "one shorter than a segment has none"
    assert sch([one, other], 2, [1])[0] == 1.0, "each begins with an empty cache"


def test_tokens_of_different_numbers_of_experts():
    ids = trace(np.array([[0.2, 0.0, 0.8], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))
    assert ids.tolist() == [[2, 0], [-1, -1], [1, -1]]
    assert segment_uses(ids, 3, 2).tolist() == [[1, 0, 1], [0, 1, 0]]
    assert hit_rates([ids], 3, [3], "lru")[0] == 1.0


@pytest.mark.parametrize(
    ("call", "where"),
    [
        (lambda: srp([drawn(4, 1, 5)], 4, 16), "traces"),
        (lambda: srp([drawn(4, 1, 50)], 4, 0), "segment"),
        (lambda: srp([drawn(4, 1, 50) + 1], 4), "traces"),
        (lambda: srp([np.zeros((4, 2))], 4), "traces"),
        (lambda: sch([drawn(4, 1, 50)], 4, [5]), "capacities"),
        (lambda: sch([np.full((5, 1), -1)], 4, [2]), "traces"),
        (lambda: hit_rates([drawn(4, 1, 50)], 4, [2], "clock"), "policy"),
    ],
)
def test_wrong(call, where):
    with pytest.raises(InputError) as caught:
        call()
    assert caught.value.where == where and POLICIES
