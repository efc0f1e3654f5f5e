"""The ragged exchange compiled for a TPU without one: the primitive is there, and ships what the formula says.

The compiler works on a described topology; nothing runs.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from molora_jax.engines import Engine, auto, hlo
from molora_jax.engines.ragged_all_to_all import bytes_moved
from molora_jax.sharding import AXES
from tests import tiny, tpu
from tests.engines import problems, test_hlo

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def v5e():
    return Mesh(np.array(tpu.devices("v5e")).reshape(1, 1, 8, 1), AXES, axis_types=(AxisType.Auto,) * 4)


@pytest.mark.parametrize("sites", [("q",), ("ffn",)], ids=["projection", "ffn"])
def test_ragged_all_to_all_on_tpu(v5e, sites):
    on = Engine("ragged_all_to_all", v5e)
    one, base = problems.rule(sites, 8, k=2), problems.weights()
    tree = problems.leaves(one, base)

    def put(x, *spec):
        return jax.ShapeDtypeStruct(np.shape(x), jnp.float32, sharding=NamedSharding(v5e, PartitionSpec(*spec)))

    shardings = {
        k: jax.tree.map(lambda x, k=k: put(x, *(("expert",) if k != "router" else ())), v) for k, v in tree.items()
    }
    x = put(problems.tokens(), ("data", "fsdp", "expert"))

    def loss(tree, base, x):
        return jnp.sum(problems.apply(on, one, tree, base, x)[0] ** 2)

    text = jax.jit(jax.grad(loss, (0, 2))).lower(shardings, jax.tree.map(put, base), x).compile().as_text()
    found = [c for c in hlo.collectives(text, 8) if c.kind == "ragged-all-to-all"]
    # there: ids, gates, rows; back: rows; then the gradients of rows, gates and of what came back
    assert len(found) == 7, [(c.kind, c.shapes) for c in found]
    wide = [c for c in hlo.collectives(text, 8) if c.kind == "all-gather" and any(problems.D in s for s in c.shapes)]
    assert not wide, "no emulation"


@pytest.mark.parametrize("method, rank_space", [("mixlora", False), ("projections", False), ("projections", True)])
def test_the_layer_scan_ships_what_the_formula_says(v5e, method, rank_space, monkeypatch):
    monkeypatch.setattr(tiny, "METHODS", tiny.METHODS | test_hlo.METHODS)
    devices = v5e.devices.reshape(2, 1, 4, 1)
    on = Engine("ragged_all_to_all", Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 4), rank_space=rank_space)
    model, _, found = test_hlo.compiled(method, on)
    tokens, expected = test_hlo.ROWS * test_hlo.LENGTH // 8, 0.0
    for *which, site in auto.routed(model):
        traffic = auto.traffic(model, *which, site, on=on, tokens=tokens, itemsize=4)
        expected += bytes_moved(traffic, on)[0] - traffic.sharded(on) - traffic.sums(on, per_expert=False)
    moved = [c.bytes_moved for c in found if c.kind == "ragged-all-to-all"]  # of a layer: no trip count on TPU
    assert sum(moved) == pytest.approx(expected, rel=0.05)
    assert len(moved) == test_hlo.number(model, {}, on)["all-to-all"] / model.config.layers
