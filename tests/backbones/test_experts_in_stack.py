"""On one device a model's grouped products read their experts from the stack of all layers (`tiles.InStack`)."""

import dataclasses

import chex
import jax
import pytest

from kernels_pallas import tiles
from molora_jax.core import lowrank
from tests.acceptance.blocks import gradient, model, noisy, output, trace_anew
from tests.battery.cases import SMALL

DEEP = dataclasses.replace(SMALL, layers=5)


@pytest.mark.parametrize("sites", [("ffn",), ("q", "down")], ids="+".join)
def test_every_expert_is_read_from_the_stack_and_nothing_changes(sites, monkeypatch):
    """Layers 1, 2 and 4 have experts: segments that do not start at 0, and layers without."""
    made = model(sites, (0, 8, 8, 0, 8), ("softmax_topk", {}), decoder=DEEP, rank=16)
    leaves, read, plain = noisy(made), [], tiles.expert
    monkeypatch.setattr(tiles, "expert", lambda A, e: read.append(isinstance(A, tiles.InStack)) or plain(A, e))
    trace_anew()
    got = output(made, leaves), gradient(made, leaves)
    assert read and all(read)
    monkeypatch.setattr(lowrank, "located", lambda factors, *_: factors)
    read.clear()
    trace_anew()
    chex.assert_trees_all_close(got, (output(made, leaves), gradient(made, leaves)), rtol=2e-5, atol=2e-5)
    trace_anew()  # others get the product's own
    assert read and not any(read)
    assert all(leaf.any() for leaf in jax.tree.leaves(got))
