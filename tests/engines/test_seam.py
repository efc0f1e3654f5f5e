"""A placement is one file and one row, an engine too: each toy meets all of the other kind, in value and gradient."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from molora_jax import engines, placements, sharding
from molora_jax.core.types import Context
from molora_jax.engines import ALONE, ENGINES, Engine, auto
from molora_jax.placements import PLACEMENTS, Chain
from molora_jax.placements.base import Beside
from tests.engines import toy_engine
from tests.engines.problems import CONFIG, B, D, S, close, leaves, mesh, rule, tokens, value_and_grads, weights
from tests.engines.toy_placement import ToyExperts


@pytest.fixture(autouse=True)
def rows(monkeypatch):
    monkeypatch.setitem(ENGINES, "toy", toy_engine)
    monkeypatch.setitem(PLACEMENTS, "toy_experts", ToyExperts)


@pytest.mark.parametrize(
    "sites, placement", [(("o",), None), (("ffn",), None), (("ffn",), Chain())], ids=["projection", "ffn", "chain"]
)
def test_an_engine_in_one_file_serves_every_placement(sites, placement):
    one, base, x = rule(sites, 6, k=2, dropout=0.2, placement=placement), weights(), tokens()
    tree = leaves(one, base)
    alone = value_and_grads(ALONE, one, key=3)(tree, base, x)
    close(value_and_grads(Engine("toy", mesh(expert=4, tensor=2)), one, key=3)(tree, base, x), alone, 5e-6)


@pytest.mark.parametrize("experts, sizes", [(8, dict(data=2, expert=4)), (6, dict(expert=4, tensor=2))])
@pytest.mark.parametrize("name", ["replicate", "gather", "all_to_all", "ragged_all_to_all", "toy"])
def test_a_placement_in_one_file_is_served_by_every_engine(name, experts, sizes):
    one = rule(("ffn",), experts, router=None, placement=ToyExperts(experts))
    tree, x = leaves(one, {}), tokens().reshape(B * S, D)
    rng = np.random.default_rng(5)
    kernels = jnp.asarray(rng.standard_normal((experts, D, D)) / 4, jnp.float32)
    idx = jnp.asarray(rng.permuted(np.tile(np.arange(experts), (B * S, 1)), axis=1)[:, :2], jnp.int32)
    gates = jnp.asarray(rng.random((B * S, 2)), jnp.float32)
    probe = jnp.asarray(rng.standard_normal(x.shape), jnp.float32)
    blank = lambda site: Context(None, None, None, None, None)  # noqa: E731

    def product(on, x, p, gates):
        part = placements.of(one).part(one, "ffn", p, {}, (idx, gates, kernels), blank, x)
        (y, _) = engines.meet(on, Beside(), {"x": x}, [part])
        return jnp.sum(y * probe), y

    def by_hand(x, p, gates):
        A, B = (p["ffn"][n][idx] for n in "AB")
        own = jnp.einsum("td,tkdo->tko", x, kernels[idx])
        own = own + one.adapter.scale() * jnp.einsum("td,tkrd,tkro->tko", x, A, B)
        y = jnp.einsum("tk,tko->to", gates, own)
        return jnp.sum(y * probe), y

    on = Engine(name, mesh(**sizes))
    (_, wanted), expected = jax.jit(jax.value_and_grad(by_hand, (0, 1, 2), has_aux=True))(x, tree, gates)
    for engine in (ALONE, on) if name == "toy" else (on,):  # one device once, whatever the engines
        run = jax.jit(jax.value_and_grad(lambda *a, on=engine: product(on, *a), (0, 1, 2), has_aux=True))
        (_, y), grads = run(x, tree, gates)
        close((y, grads), (wanted, expected), 5e-6)
    if on.stored(experts):
        assert all(g.addressable_shards[0].data.shape[0] == experts // 4 for g in grads[1]["ffn"].values())


def test_storage_and_the_table_follow_from_what_it_says():
    from molora_jax.backbones.model import Model

    one = dataclasses.replace(rule(("ffn",), 8, router=None, placement=ToyExperts(8)))
    on = Engine("gather", mesh(data=2, expert=4))
    model = Model(CONFIG, (one,), engine=on)
    adapters = {"r": {"000-000": jax.tree.map(lambda a: a[None], leaves(one, {}))}}
    placed = jax.tree.leaves(sharding.adapter_shardings(adapters, model, on.mesh))
    assert all(leaf.spec == jax.sharding.PartitionSpec(None, "expert") for leaf in placed)
    table = {row.name: row for row in auto.table(model, on, tokens=4, itemsize=4)}
    own, frozen = 8 * 4 * 2 * D * 4, 8 * D * D * 4
    sharded = 2 * own / 4 * (8 // 4 - 1) / (8 // 4)
    assert table["gather"].shipped == pytest.approx((3 * own + 2 * frozen) * 3 / 4 + sharded)
    assert table["replicate"].shipped == pytest.approx(2 * frozen * 3 / 4 + 2 * own * 7 / 8)
    assert not table["all_to_all"].refused and "toy" in table
