"""How many parameters a model trains, counted on shapes alone: no weights are read and nothing is computed."""

import jax
import jax.numpy as jnp

from molora_jax.backbones.families import DecoderConfig, hf_shapes, transposed
from molora_jax.core import trees
from molora_jax.core.trees import set_path


def base_shapes(decoder: DecoderConfig) -> dict:
    """The tree of a base's parameters (`families.py`), as shapes."""
    shapes: dict = {}
    for path, shape in hf_shapes(decoder).items():
        shape = shape[::-1] if transposed(path) else shape
        stack = (decoder.layers,) if path.startswith("blocks/") else ()
        set_path(shapes, path, jax.ShapeDtypeStruct((*stack, *shape), jnp.float32))
    return shapes


def num_trainable(model) -> int:
    """Leaves that train in some stage, all layers, factors and routers."""
    adapters = jax.eval_shape(lambda p: model.init_adapters(jax.random.key(0), p), base_shapes(model.config))
    return trees.count(trees.split(adapters, model.frozen_patterns())[0])
