"""A chain of experts under every engine: each pass meets its experts wherever they are, on eight devices.

Against the passes as they read (`by_hand`), in value and every gradient; what has more forms against one device.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from molora_jax.engines import ALONE, ENGINES, Engine, auto, common
from molora_jax.placements import Chain
from tests.engines.problems import B, S, close, leaves, mesh, rule, tokens, value_and_grads, weights
from tests.engines.test_auto import ROUTER, model_of


@pytest.fixture(autouse=True)
def nan_buffers(monkeypatch):
    monkeypatch.setattr(common, "FILL", float("nan"))


def by_hand(one, tree, base, x):
    """`FFN(x) + z(C) - z(0)`, every expert applied to every token, top-k of a softmax, padding without experts."""
    z, valid = x, jnp.ones(x.shape[:2], bool).at[0, -2:].set(False)[..., None]
    for t in range(one.placement.iterations):
        probs = jax.nn.softmax(z @ tree["router"][f"pass{t}"]["W"].T)
        kth = jnp.sort(probs, axis=-1)[..., -one.router.k, None]
        gates = jnp.where((probs >= kth) & valid, probs, 0.0)
        gates = gates / jnp.maximum(gates.sum(-1, keepdims=True), 1e-30)
        rank = jnp.einsum("bsd,erd->bser", z, tree["ffn"]["A"])
        z = z + one.adapter.scale() * jnp.einsum("bse,bser,ero->bso", gates, rank, tree["ffn"]["B"])
    return (jax.nn.silu(x @ base["gate"]) * (x @ base["up"])) @ base["down"] + z - x


SIZES = {"data": dict(data=2, expert=4), "tensor": dict(expert=4, tensor=2)}
QUICK = ("replicate", "data"), ("gather", "tensor"), ("all_to_all", "tensor"), ("ragged_all_to_all", "data")


def grid():
    points = itertools.product(ENGINES, SIZES)
    return [pytest.param(*p, marks=[] if p in QUICK else [pytest.mark.slow]) for p in points]


@pytest.mark.parametrize("name, sizes", grid())
def test_equals_the_passes_as_they_read(name, sizes):
    sizes, experts = SIZES[sizes], 8 if sizes == "data" else 6  # 6 experts on 4 devices are padded, or whole
    one, base, x = rule(("ffn",), experts, k=2, placement=Chain(), renormalise=True), weights(), tokens()
    tree = leaves(one, base)
    y, grads, stats = value_and_grads(Engine(name, mesh(**sizes)), one)(tree, base, x)

    def loss(x, tree):
        y = by_hand(one, tree, base, x)
        return jnp.sum(y * jnp.asarray(np.random.default_rng(9).standard_normal(y.shape), y.dtype)), y

    (_, wanted), expected = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(x, tree)
    close((y, grads), (wanted, expected), 5e-6)
    assert [float(stats["r"][t]["expert_load"]["slots"]) for t in ("pass0", "pass1")] == [2 * (B * S - 2)] * 2
    if name != "replicate" and experts == 8:
        assert all(g.addressable_shards[0].data.shape[0] == 2 for g in grads[1]["ffn"].values()), "in shards"


FORMS = {
    "rank space": (dict(), dict(rank_space=True)),
    "rank space, nonlinearity": (dict(nonlinearity="silu"), dict(rank_space=True)),
    "three passes, one router": (dict(iterations=3, gating="shared", nonlinearity="gelu"), {}),
    "one decision": (dict(gating="once"), {}),
    "outer": (dict(residual="outer"), {}),
}


@pytest.mark.parametrize(
    "form", [pytest.param(f, marks=[] if "nonlinearity" in f else [pytest.mark.slow]) for f in FORMS]
)
def test_forms_equal_one_device(form):
    options, engine = FORMS[form]
    one, base, x = rule(("ffn",), 4, k=2, dropout=0.3, placement=Chain(**options)), weights(), tokens()
    tree = leaves(one, base)
    alone = value_and_grads(ALONE, one, key=3)(tree, base, x)
    on = Engine("all_to_all", mesh(data=2, expert=2, tensor=2), **engine)
    close(value_and_grads(on, one, key=3)(tree, base, x), alone, 5e-6)


def test_a_capacity_drops_changes_of_a_pass_and_counts_them():
    one, base, x = rule(("ffn",), 8, k=2, placement=Chain(iterations=1)), weights(), tokens()
    tree = leaves(one, base, skew=30.0)  # experts 0 and 1, on one of four peers
    y, grads, stats = value_and_grads(Engine("all_to_all", mesh(data=2, expert=4), capacity=1.0), one)(tree, base, x)
    sums = stats["r"]["pass0"]["expert_load"]
    assert float(sums["sent"]) == 2 * (B * S - 2) and float(sums["dropped"]) == 6 * 7 + 2
    full = value_and_grads(ALONE, one)(tree, base, x)[0]
    close(y[:, :1], full[:, :1])
    close(y[:, 1:], ((jax.nn.silu(x @ base["gate"]) * (x @ base["up"])) @ base["down"])[:, 1:])
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_the_table_counts_every_pass():
    from configs import common as configs

    placement = dict(name="chain", iterations=2, gating="independent", residual="inner", nonlinearity="none")
    rows = {}
    for passes in (1, 2):
        rules = dict(a=configs.rule("ffn", experts="8", adapter=configs.adapter(), router=ROUTER,
                                    placement=placement | dict(iterations=passes)))  # fmt: skip
        _, model = model_of(rules)
        table = auto.table(model, Engine("replicate", mesh(expert=8)), tokens=64, itemsize=4)
        rows[passes] = {row.name: row for row in table}
        assert not any(row.refused for name, row in rows[passes].items() if not name.startswith("ragged"))
    for name in ENGINES:
        assert rows[1][name].shipped < rows[2][name].shipped <= 2.2 * rows[1][name].shipped
