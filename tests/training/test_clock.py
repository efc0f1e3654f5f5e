"""What a run says of its own speed: columns, goodput, and the count of FLOPs against the multiplications of a trace."""

import importlib
import time

import jax
import numpy as np
import pytest

from molora_jax import config as config_lib
from molora_jax.backbones.compile import compile_model
from molora_jax.io.base import load_base
from molora_jax.runs.metrics import is_timing
from molora_jax.training.clock import Clock, peak_flops
from molora_jax.training.flops import per_token


def test_a_save_between_two_steps_is_none_of_the_step(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    clock = Clock(jax.devices()[:4], flops=2.0, began=90.0)
    clock.peak = 1000.0

    def passes(what, seconds):
        with clock.of(what):
            now[0] += seconds

    passes("data", 0.5)
    now[0] += 1.5
    first = clock.row(800, 2.0)
    assert first["time/tokens_per_second_device"] == 100 and first["time/data_seconds"] == 0.5
    assert first["time/mfu"] == 0.2
    now[0] += 2.0
    passes("checkpoint", 6.0)
    assert clock.row(800, 8.0)["time/tokens_per_second_device"] == 100
    assert clock.steps == [2.0]
    text = clock.told()
    assert text.startswith("goodput 18%: a step 2 s") and "start 50%" in text and "checkpoint 30%" in text
    assert all(map(is_timing, first)) and is_timing("seconds") and not is_timing("loss")


def test_chips_are_known_by_their_kind():
    assert peak_flops("TPU v5 lite") == 197e12 and peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("TPU v5p") == 459e12 and peak_flops("cpu") is None


def products(jaxpr) -> int:
    """FLOPs of all `dot_general` of a trace, those of inner traces and of a scan's turns included."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            shared = np.prod([eqn.invars[0].aval.shape[i] for i in contract])
            total += 2 * int(np.prod(eqn.outvars[0].aval.shape) * shared)
        turns = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        for value in eqn.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    total += turns * products(inner)
    return total


@pytest.mark.parametrize("source", ["random:tiny", "random:tiny-untied"])
def test_the_count_is_that_of_the_products(source):
    """Forward alone, LoRA without dropout: half of what a frozen number costs, a third of a trained one's."""
    config = importlib.import_module("configs.lora").get_config()
    config.base.source = source
    for rule in config.method.rules.values():
        rule.adapter.dropout = 0.0
    config_lib.validate(config)
    base = load_base(source)
    model = compile_model(config, base.config)
    S = 256  # one block of scores: nothing above the diagonal is left out
    adapters = jax.eval_shape(lambda: model.init_adapters(jax.random.key(0), base.params))
    counted = per_token(model, adapters, {}, (), S)
    scores = 12 * S * base.config.dims("o")[0] * base.config.layers
    low_rank = 6 * sum(int(np.prod(x.shape)) for x in jax.tree.leaves(adapters))
    forward = (counted - scores - low_rank) / 2 + scores / 3 + low_rank / 3
    batch = {"tokens": np.ones((1, S), np.int32), "segment_ids": np.ones((1, S), np.int32)}
    batch |= {"positions": np.arange(S, dtype=np.int32)[None], "task_ids": np.zeros((1, 1), np.int32)}

    def logits(params, adapters):
        hidden = model.hidden(params, adapters, model.init_router_state(), batch)[0]
        return model.logits(params, hidden)

    params = jax.eval_shape(lambda: base.params)
    found = products(jax.make_jaxpr(logits)(params, adapters).jaxpr) / S
    assert found == pytest.approx(forward, rel=0.12)
