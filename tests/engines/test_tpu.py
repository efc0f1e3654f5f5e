"""The ragged exchange compiled for a TPU without one: the primitive is there, and ships what the formula says.

The compiler works on a described topology; nothing runs.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from molora_jax.engines import Engine, hlo
from molora_jax.sharding import AXES
from tests import tpu
from tests.engines import problems

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

    place = {
        k: jax.tree.map(lambda x, k=k: put(x, *(("expert",) if k != "router" else ())), v) for k, v in tree.items()
    }
    x = put(problems.tokens(), ("data", "fsdp", "expert"))

    def loss(tree, base, x):
        return jnp.sum(problems.apply(on, one, tree, base, x)[0] ** 2)

    text = jax.jit(jax.grad(loss, (0, 2))).lower(place, jax.tree.map(put, base), x).compile().as_text()
    found = [c for c in hlo.collectives(text, 8) if c.kind == "ragged-all-to-all"]
    # there: ids, gates, rows; back: rows; then the gradients of rows, gates and of what came back
    assert len(found) == 7, [(c.kind, c.shapes) for c in found]
    wide = [c for c in hlo.collectives(text, 8) if c.kind == "all-gather" and any(problems.D in s for s in c.shapes)]
    assert not wide, "no emulation"
