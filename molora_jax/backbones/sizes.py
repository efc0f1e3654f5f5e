"""How many parameters a model trains, counted on shapes alone: no weights are read and nothing is computed."""

import jax
import jax.numpy as jnp

from molora_jax.backbones.base import Backbone
from molora_jax.core import trees
from molora_jax.core.trees import set_path


def base_shapes(backbone: Backbone) -> dict:
    """The tree of a base's parameters, as shapes."""
    shapes: dict = {}
    for path, leaf in backbone.shapes().items():
        set_path(shapes, path, jax.ShapeDtypeStruct(leaf.shape, jnp.float32))
    return shapes


def num_trainable(model) -> int:
    """Leaves that train in some stage, all layers, factors and routers."""
    adapters = jax.eval_shape(lambda p: model.init_adapters(jax.random.key(0), p), base_shapes(model.config))
    return trees.count(trees.split(adapters, model.frozen_patterns())[0])
