"""The whole training step under an engine is the step of one device: loss, gradient norm, statistics, gradients."""

import re

import jax
import pytest

from molora_jax.catalogue.methods import METHODS
from molora_jax.engines import Engine, auto
from molora_jax.errors import InputError
from tests.battery.cases import Case, method, random_adapters
from tests.battery.checks import same_step
from tests.engines.problems import mesh

EXPERT, TENSOR = dict(data=2, expert=4), dict(expert=4, tensor=2)


def check(name, engine, sizes, **changes):
    one, many = Case(method(name, **changes)), Case(method(name, **changes), mesh=mesh(**sizes), engine=engine)
    adapters = random_adapters(one.model, one.params)
    _, metrics, gradients = one.run(one.start(adapters))
    state, metrics8, gradients8 = many.run(one.start(adapters))
    same_step(metrics, gradients, metrics8, gradients8)
    return many, state


def test_mixlora_with_gathered_experts():
    case, state = check("mixlora", "gather", EXPERT, **{"method.rules.ffn.adapter.dropout": 0.1})
    adapters, moments = state.adapters["ffn"], state.opt[1]
    shard = next(iter(adapters.values()))["up"]["B"].addressable_shards[0].data
    assert shard.shape[1] == 2, "8 experts on 4 devices"
    same = [x.sharding.spec for x in jax.tree.leaves(moments) if x.ndim == 4 and x.shape[1] == 8]
    assert same and all(spec == (None, "expert") or spec[1] == "expert" for spec in same)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("engine, sizes", [("replicate", TENSOR), ("gather", TENSOR), ("all_to_all", EXPERT)])
def test_every_method(name, engine, sizes):
    case, devices = Case(method(name)), mesh(**sizes)
    why = auto.refusal(case.model, Engine(engine, devices))
    if not why:
        return check(name, engine, sizes)
    with pytest.raises(InputError, match=re.escape(why)):
        auto.resolve(case.model, engine=engine, mesh=devices, capacity=0.0, rank_space=False, tokens=96, itemsize=4)
