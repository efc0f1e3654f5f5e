"""Checkpoints whose layers are all full, all slide, all have positions or none: what a kind needs is not there."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from molora_jax.backbones.hf_config import from_hf
from molora_jax.backbones.model import Model
from molora_jax.backbones.sizes import base_shapes
from molora_jax.io.base import load_base
from tests.backbones import family_cases, one_kind_cases

FIXTURE = pathlib.Path(__file__).parents[1] / "fixtures" / "one_kind.npz"


def logits(model, params):
    tokens, _ = family_cases.rows()
    positions = jnp.broadcast_to(jnp.arange(family_cases.S), tokens.shape)
    batch = dict(tokens=jnp.asarray(tokens), positions=positions, segment_ids=jnp.ones(tokens.shape, jnp.int32))
    return model.logits(params, model.hidden(params, {}, {}, batch)[0])


@pytest.mark.parametrize("name", one_kind_cases.COMPARED)
def test_logits_are_those_of_transformers(tmp_path, name):
    base = load_base(family_cases.write(tmp_path, "folder", one_kind_cases.COMPARED[name]))
    with jax.default_matmul_precision("highest"):
        ours = family_cases.project(
            np.asarray(jax.jit(logits, static_argnums=0)(Model(base.config), base.params)), seed=1
        )
    with np.load(FIXTURE, allow_pickle=False) as file:
        assert np.linalg.norm(ours - file[name]) / np.linalg.norm(file[name]) < 1e-4


@pytest.mark.parametrize("name", one_kind_cases.TRACED)
def test_every_family_runs(name):
    config = from_hf(one_kind_cases.TRACED[name], where="config.json")
    params = base_shapes(config, jnp.float32, "none")
    out = jax.eval_shape(lambda p: logits(Model(config), p), params)
    assert out.shape == (2, family_cases.S, config.vocab)
