"""Every engine equals the mixture as it reads, in value and in every gradient, on eight devices.

Rows of a buffer that nobody writes hold NaN here, so a reader that does not mask shows.
"""

import jax
import numpy as np
import pytest

from molora_jax.engines import ALONE, ENGINES, Engine, common
from tests.engines.problems import B, D, F, S, close, leaves, mesh, rule, tokens, value_and_grads, weights

CASES = {  # sites, experts, mesh, router
    "projection": (("q",), 8, dict(data=2, expert=4), dict(k=2)),
    "row-parallel, E not a multiple of P": (("down",), 6, dict(expert=4, tensor=2), dict(router="top_p", p=0.5)),
    "ffn": (("ffn",), 8, dict(fsdp=2, expert=4), dict(router="top_p", p=0.5)),
    "ffn, E not a multiple of P": (("ffn",), 6, dict(expert=4, tensor=2), dict(k=2)),
}


@pytest.fixture(autouse=True)
def nan_buffers(monkeypatch):
    monkeypatch.setattr(common, "FILL", float("nan"))


def inputs(sites):
    return tokens(F if sites == ("down",) else D)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ENGINES)
def test_equals_the_einsum(name, case):
    sites, experts, sizes, router = CASES[case]
    one, base, x = rule(sites, experts, **router), weights(), inputs(sites)
    run = value_and_grads(Engine(name, mesh(**sizes)), one)
    for skew in (0, 30.0):  # 30: all tokens on the first experts, the others empty
        tree = leaves(one, base, skew=skew)
        y, grads, stats = run(tree, base, x)
        expected = value_and_grads(ALONE, one, reference=True)(tree, base, x)
        close((y, grads), expected[:2])
        sums = stats["r"][one.scopes[0]]["expert_load"]
        assert float(sums["tokens"]) == B * S - 2
        assert (np.count_nonzero(sums["count"]) < experts) == bool(skew)
    if name != "replicate" and experts == 8:
        for part in jax.tree.leaves({k: v for k, v in grads[1].items() if k != "router"}):
            assert part.addressable_shards[0].data.shape[0] == experts // 4, "gradients lie where the experts lie"


@pytest.mark.parametrize("sites", [("o",), ("ffn",)], ids=["projection", "ffn"])
def test_dropout_does_not_depend_on_the_engine(sites):
    one, base, x = rule(sites, 4, k=2, dropout=0.3), weights(), inputs(sites)
    tree = leaves(one, base)
    alone = value_and_grads(ALONE, one, key=3)(tree, base, x)
    for name, sizes in (("replicate", dict(data=2, tensor=2)), ("all_to_all", dict(data=2, expert=2, tensor=2))):
        close(value_and_grads(Engine(name, mesh(**sizes)), one, key=3)(tree, base, x), alone)


def test_one_expert_without_a_router_is_everywhere():
    one, base, x = rule(("o",), 1, router=None), weights(), inputs(("o",))
    tree = leaves(one, base)
    alone = value_and_grads(ALONE, one)(tree, base, x)
    for name in ENGINES:
        close(value_and_grads(Engine(name, mesh(expert=2, tensor=2)), one)(tree, base, x), alone)


def test_dora_on_local_engines_and_on_the_ffn():
    for sites, name, down in ((("v",), "gather", "once"), (("ffn",), "all_to_all", "per_expert")):
        one, base, x = rule(sites, 4, adapter="dora", k=2, down=down), weights(), inputs(sites)
        tree = leaves(one, base)
        alone = value_and_grads(ALONE, one)(tree, base, x)
        close(value_and_grads(Engine(name, mesh(data=2, expert=2, tensor=2)), one)(tree, base, x), alone)


@pytest.mark.parametrize("name", ["all_to_all", "ragged_all_to_all"])
def test_rank_space(name):
    for sites in (("k",), ("o",)):
        one, base, x = rule(sites, 6, k=2), weights(), inputs(sites)
        tree = leaves(one, base)
        run = value_and_grads(Engine(name, mesh(expert=4, tensor=2), rank_space=True), one)
        close(run(tree, base, x)[:2], value_and_grads(ALONE, one)(tree, base, x)[:2])


@pytest.mark.parametrize("name", ["all_to_all", "ragged_all_to_all"])
@pytest.mark.parametrize("sites", [("q",), ("ffn",)], ids=["projection", "ffn"])
def test_capacity_drops_and_counts(name, sites):
    one, base, x = rule(sites, 8, k=2), weights(), inputs(sites)
    tree = leaves(one, base, skew=30.0)  # experts 0 and 1, on one of four peers
    run = value_and_grads(Engine(name, mesh(data=2, expert=4), capacity=1.0), one)
    y, grads, stats = run(tree, base, x)
    sums = stats["r"][one.scopes[0]]["expert_load"]
    # 4 tokens a device, 8 slots for one peer, room for 1.0 * 4 * 2 / 4 = 2; the first token keeps its two
    assert float(sums["sent"]) == 2 * (B * S - 2)
    assert float(sums["dropped"]) == 6 * 7 + 2  # device 0 has two tokens of padding
    full = value_and_grads(ALONE, one)(tree, base, x)[0]
    plain = x @ base["q"] if sites == ("q",) else (jax.nn.silu(x @ base["gate"]) * (x @ base["up"])) @ base["down"]
    close(y[:, :1], full[:, :1])
    close(y[:, 1:], plain[:, 1:])  # a dropped token has the frozen base
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_capacity_with_room_drops_nothing():
    one, base, x = rule(("q",), 8, k=2), weights(), inputs(("q",))
    tree = leaves(one, base)
    y, grads, stats = value_and_grads(Engine("all_to_all", mesh(data=2, expert=4), capacity=4.0), one)(tree, base, x)
    assert float(stats["r"]["q"]["expert_load"]["dropped"]) == 0
    close((y, grads), value_and_grads(ALONE, one)(tree, base, x)[:2])
