"""How many parameters a model trains, counted on shapes alone: no weights are read and nothing is computed."""

import jax
import jax.numpy as jnp

from molora_jax.backbones.base import Backbone
from molora_jax.core import trees
from molora_jax.core.quant import empty
from molora_jax.core.trees import set_path


def base_shapes(backbone: Backbone, dtype=jnp.float32, quant: str = "none") -> dict:
    """The tree of a base's parameters, as shapes."""
    shapes: dict = {}
    for path, leaf in backbone.shapes().items():
        held = jax.ShapeDtypeStruct(leaf.shape, dtype)
        if quant != "none" and leaf.product:
            held = empty(leaf.shape, quant, dtype, jax.ShapeDtypeStruct, where=path)
        set_path(shapes, path, held)
    return shapes


def num_trainable(model) -> int:
    """Leaves that train in some stage, all layers, factors and routers."""
    adapters = jax.eval_shape(lambda p: model.init_adapters(jax.random.key(0), p), base_shapes(model.config))
    return trees.count(trees.split(adapters, model.frozen_patterns())[0])
