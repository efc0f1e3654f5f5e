"""What a base's own experts ship under every engine: frozen kernels, tokens, gradients, as the table says."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from molora_jax import sharding
from molora_jax.engines import Engine, auto, hlo
from tests.backbones import test_moe as moe
from tests.engines.problems import mesh


@pytest.mark.parametrize(
    "name, factors",
    [
        ("gather", "shared_outer"),
        ("all_to_all", None),  # a rule on attention alone: the base's experts meet tokens all the same
        pytest.param("gather", "own", marks=pytest.mark.slow),
        pytest.param("replicate", "one", marks=pytest.mark.slow),
        pytest.param("all_to_all", "shared_outer", marks=pytest.mark.slow),
    ],
)
def test_the_layer_scan_ships_what_the_formula_says(name, factors):
    config = moe.config_of(factors or "own")
    if factors is None:
        config.method.rules = dict(a=common.rule("q", adapter=common.adapter(rank=4, dropout=0.0)))
    model = moe.checked(config)
    params, adapters, batch, _ = moe.problem(model)
    on = Engine(name, mesh(data=2, expert=4))
    model = dataclasses.replace(model, engine=on, remat="dots")
    shardings = {"params": sharding.param_shardings(model.config, params, on.mesh)}
    shardings["adapters"] = sharding.adapter_shardings(adapters, model, on.mesh)
    shardings["batch"] = {field: sharding.row_sharding(on.mesh) for field in batch}
    shapes = {
        group: jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=s), tree, shardings[group])
        for group, tree in (("params", params), ("adapters", adapters), ("batch", batch))
    }

    def loss(adapters, embed, params, batch):
        hidden, *_ = model.hidden(
            params | {"embed": embed}, adapters, {}, batch, train=True, key=jax.random.key(1),
            constrain=sharding.constrain(on.mesh),
        )  # fmt: skip
        return jnp.sum(hidden**2)

    wrt = (0, 1) if factors else (1,)  # sums of an unrouted rule's gradients are not in the table
    out = tuple((shardings["adapters"], shardings["params"]["embed"])[i] for i in wrt)
    grad = jax.jit(jax.grad(loss, wrt), out_shardings=out)
    lowered = grad.lower(shapes["adapters"], shapes["params"]["embed"], shapes["params"], shapes["batch"])
    found = [c for c in hlo.collectives(lowered.compile().as_text(), 8) if c.loop and c.devices > 1]
    rows = auto.table(model, on, tokens=moe.B * moe.S // 8, itemsize=4)
    row = next(row for row in rows if row.name == name)
    assert row.refused == "" and row.shipped > 0
    assert sum(c.bytes_moved for c in found) == pytest.approx(row.shipped, rel=0.05)
