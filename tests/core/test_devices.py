"""One device against eight (data 4 x fsdp 2), float32, dropout 0, on packed rows of the task math.

A step's sums are added in another order on another mesh. For plain LoRA that stays in the last digits; with top-k
routing a flipped choice makes two runs drift apart: compared closely for one step and loosely for twenty.
"""

import jax
import numpy as np
import pytest

from launch import flags
from molora_jax import config as schema
from molora_jax import sharding
from molora_jax.core import trees
from molora_jax.optim import OPTIMIZERS
from molora_jax.training.setup import setup
from molora_jax.training.step import fresh, make_step
from tests.battery.cases import ROOT, changed
from tests.battery.checks import matches

STEPS = 20


def config_of(name):
    config = flags.load(ROOT / "configs" / f"{name}.py")
    fixed = {f"method.rules.{rule}.adapter.dropout": 0.0 for rule in config.method.rules}
    fixed |= {"base.source": "random:tiny", "data.tasks": "math", "train.batch_size": 8, "train.steps": STEPS}
    return changed(config, fixed | {"optim.learning_rate": 2e-4})


def run(config, num_devices, steps=STEPS):
    """`(losses, metrics of the first step)`."""
    config = schema.from_dict(schema.to_dict(config))
    if num_devices == 8:
        config.mesh.update(data=4, fsdp=2)
    made = setup(config, devices=jax.devices()[:num_devices])
    frozen, options = made.model.frozen_patterns(), dict(config.optim)
    member = OPTIMIZERS[options.pop("name")](**options)
    shapes = jax.eval_shape(made.model.init_adapters, jax.random.key(1), made.params)
    optimizer = member.make(STEPS, trees.pairs(made.model, trees.split(shapes, frozen)[0]))
    step = make_step(
        made.model, optimizer, member.schedule(STEPS), seed=0, frozen=frozen, accumulate=1, clip=1.0,
        targets_per_row=made.data.train.targets_per_row, constrain=sharding.constrain(made.mesh),
    )  # fmt: skip
    whole = sharding.replicated(made.mesh)
    step = jax.jit(step, out_shardings=(whole, whole), donate_argnums=0)
    start = lambda p: fresh(made.model, optimizer, p, frozen, jax.random.key(1))  # noqa: E731
    state, losses, first = jax.jit(start, out_shardings=whole)(made.params), [], None
    for i in range(steps):
        batch = sharding.put_batch(made.data.train.batch(i), made.mesh, 8)
        state, metrics = step(state, made.params, batch)
        metrics = jax.device_get(metrics)
        losses.append(float(metrics["loss"]))
        first = first or metrics
    return losses, first


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOLORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def test_lora_first_twenty_losses_are_equal():
    (one, first), (eight, first8) = (run(config_of("lora"), n) for n in (1, 8))
    np.testing.assert_allclose(eight, one, rtol=1e-5)
    matches(first, first8, rtol=1e-5, atol=1e-7)
    assert one[-1] < one[0] and len(set(one)) == STEPS, "it trains, on other rows each step"


@pytest.mark.parametrize("name", [pytest.param("mixlora", marks=pytest.mark.slow), "mola"])
def test_routed_first_step_is_equal_and_twenty_losses_are_near(name):
    (one, first), (eight, first8) = (run(config_of(name), n) for n in (1, 8))
    matches(first, first8, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(eight, one, rtol=1e-2)
    assert one[-1] < one[0]
