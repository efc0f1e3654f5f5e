"""peft's numbers (`tests/fixtures/make_baselines.py`): a tiny Llama with biases, its adapters, its logits."""

import functools
import json
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

from molora_jax.adapters import ADAPTERS
from molora_jax.backbones.model import Model
from molora_jax.core.rules import Rule
from molora_jax.io import huggingface
from tests.io import tiny_files

PEFT = np.load(pathlib.Path(__file__).parents[1] / "fixtures" / "baselines.npz")
GROUPS = dict.fromkeys(("q", "k", "v", "o"), "self_attn") | dict.fromkeys(("gate", "up", "down"), "mlp")
LAYERS = (0, 1)


def of(method, layer, site, name):
    """A parameter of peft's at one projection."""
    return PEFT[f"{method}/model.layers.{layer}.{GROUPS[site]}.{site}_proj.{name}"]


def stacked(method, site, name, expand=lambda x: x[None]):
    """`[L, 1, ...]` of all layers: one expert."""
    return jnp.stack([jnp.asarray(expand(of(method, layer, site, name))) for layer in LAYERS])


@functools.cache
def base():
    """`(backbone, params)` of the tiny Llama."""
    weights = {name.removeprefix("base/"): PEFT[name] for name in PEFT.files if name.startswith("base/")}
    with tempfile.TemporaryDirectory() as folder:
        tiny_files.write_hf_folder(pathlib.Path(folder) / "base", json.loads(str(PEFT["config"])), weights)
        config, stored = huggingface.opened(pathlib.Path(folder) / "base", np.float32)
        return config, huggingface.read(stored)


def logits(adapter, sites, leaves, shared=None, params=None, **options):
    """Of `ids`, with one expert at every site: `leaves(site) -> {leaf: [L, 1, ...]}`."""
    backbone, own = base()
    params = own if params is None else params
    rule = Rule("all", sites, (1,) * len(LAYERS), ADAPTERS[adapter](dropout=0.0, **options))
    model, ids = Model(backbone, (rule,), (), "none", 1), jnp.asarray(PEFT["ids"])[None]
    tree = {"all": {"000-001": {site: leaves(site) for site in sites}} | ({"shared": shared} if shared else {})}
    batch = dict(tokens=ids, segment_ids=jnp.ones_like(ids), positions=jnp.arange(ids.shape[1])[None])
    return np.asarray(jax.jit(lambda p, a: model.logits(p, model.hidden(p, a, {}, batch)[0])[0])(params, tree))
