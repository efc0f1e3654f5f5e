"""What acceptance tests start from: a small decoder with random weights, a packed batch, a model from rules."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from configs import common
from molora_jax import config as schema
from molora_jax.backbones.compile import compile_model
from molora_jax.backbones.families import TINY
from molora_jax.core import trees
from molora_jax.decode import generate as decoding
from molora_jax.io.random_init import random_params
from molora_jax.objectives.lm import lm
from molora_jax.training.step import loss_sums
from tests.battery.cases import fresh_adapters

SMALL = dataclasses.replace(TINY, layers=3, width=32, ffn_width=48, heads=2, kv_heads=1, head_dim=16, vocab=64)
B, S = 2, 12


@functools.cache
def base(decoder=SMALL):
    return random_params(decoder, seed=1)[0]


def batch(seed=0, rows=B):
    """Two packed examples a row and some padding; the second half of each example has targets."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, SMALL.vocab, (rows, S)).astype(np.int32)
    segment_ids = np.array([[1] * 5 + [2] * 5 + [0] * 2] * rows, np.int32)
    positions = np.array([[*range(5), *range(5), 0, 0]] * rows, np.int32)
    weight = np.array([[0, 0, 1, 1, 1] * 2 + [0, 0]] * rows, np.float32)
    task_ids = np.array([[0] * 5 + [1] * 7] * rows, np.int32)
    return dict(
        tokens=tokens, targets=np.roll(tokens, -1, axis=1), segment_ids=segment_ids, positions=positions,
        loss_weight=weight, task_ids=task_ids, example_ids=segment_ids + 10 * np.arange(rows)[:, None].astype(np.int32),
    )  # fmt: skip


def rules_config(rules, losses=None, **fields):
    """A validated config with these rules, without dropout unless they say so; `fields` are groups to update."""
    config = common.get_config()
    config.method.rules = rules
    config.losses = losses or {}
    config.base.source = "random:tiny"
    for group, values in fields.items():
        config[group].update(values)
    schema.validate(config)
    return config


def build(rules, losses=None, decoder=SMALL, **fields):
    """`(model, params, adapters of step 0)`."""
    config = rules_config(rules, losses, **fields)
    schema.check_model(config, decoder.layers, decoder.dims, decoder.ABSENT)
    model = compile_model(config, decoder, max_segments=3)
    return model, base(decoder), fresh_adapters(model, jax.random.key(3), base(decoder))


def randomised(adapters, seed=5, scale=0.2):
    """Every float leaf moved away from its start."""
    rng = np.random.default_rng(seed)
    move = lambda x: x + (scale * rng.standard_normal(x.shape)).astype(x.dtype)  # noqa: E731
    moved = lambda x: move(x) if jnp.issubdtype(x.dtype, jnp.floating) else x  # noqa: E731
    return jax.device_put(jax.tree.map(moved, jax.device_get(adapters)))


@functools.partial(jax.jit, static_argnames="model")
def hidden(model, params, adapters, data, state=None):
    return model.hidden(params, adapters, state or {}, data)[0]


@functools.partial(jax.jit, static_argnames=("model", "collect"))
def run(model, params, adapters, data, state=None, collect=False):
    """`(hidden, sums, gates)`."""
    h, sums, _, gates = model.hidden(params, adapters, state or {}, data, collect=collect)
    return h, sums, gates


@functools.partial(jax.jit, static_argnames=("model", "frozen"))
def gradient(model, params, adapters, data, frozen=None):
    """Of the mean NLL and the routing losses, with respect to the trainable leaves; `frozen` replaces the members'."""
    frozen = model.frozen_patterns() if frozen is None else frozen
    trainable, fixed = trees.split(adapters, frozen)

    def objective(trainable):
        h, sums, _, _ = model.hidden(params, trees.merge(trainable, fixed), {}, data, train=True)
        total = lm(model, params, h, data, 6) / jnp.sum(data["loss_weight"])
        for name, loss in model.losses:
            total += loss.weight * loss.value(loss_sums(sums, name))
        return total

    return jax.value_and_grad(objective)(trainable)


def cache_changes_nothing(model, params, adapters, *, new=6):
    """A short and a long prompt decoded with a cache and without: the same ids, logits to 1e-4. Returns the prompts."""
    prompts = [[5, 6, 7], list(range(1, 40))]
    packed = decoding.pad(prompts, new, model.config.context, 0, rows=2)
    size = decoding.new_slots(packed[0].shape[1], new)
    cached, plain = (
        jax.device_get(decoding.decode(
            params, adapters, {}, *packed, np.float32(0), np.int32(-1), model=model, size=size, sample=False,
            cache=cache, keep_logits=True,
        ))
        for cache in (True, False)
    )  # fmt: skip
    np.testing.assert_array_equal(cached[0], plain[0])
    np.testing.assert_allclose(cached[2][:, :new], plain[2][:, :new], atol=1e-4)
    return prompts
