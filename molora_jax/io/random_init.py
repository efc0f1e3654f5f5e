"""Random parameters for any `DecoderConfig`: the base of tests and of dry runs.

Kernels are normal with standard deviation `D_in ** -0.5`, `o` and `down` divided by `sqrt(2 L)` (the residual stream
keeps its size over layers), embeddings 0.02, norms 1, biases 0. Logits are then of order 0.1.
"""

import dataclasses
import hashlib
import math

import numpy as np

from molora_jax.backbones import families
from molora_jax.core.trees import set_path

_ADDED = ("o_bias", "window", "sliding")


def random_params(config: families.DecoderConfig, *, seed: int = 0, dtype="float32") -> tuple[dict, str]:
    """`(params, digest)`; numpy, the tree of `families.py`. The values do not depend on `dtype` but for rounding."""
    rng = np.random.Generator(np.random.PCG64(seed))
    params, digest = {}, hashlib.sha256(_described(config).encode())
    for path, shape in families.hf_shapes(config).items():
        site = path.removeprefix("blocks/").split("/")[0]
        stack = (config.layers,) if path.startswith("blocks/") else ()
        shape = shape[::-1] if families.transposed(path) else shape
        if path.endswith("/kernel"):
            d_in, d_out = shape
            scale = d_in**-0.5 / (math.sqrt(2 * config.layers) if site in ("o", "down") else 1.0)
            leaf = rng.standard_normal((*stack, d_in, d_out), np.float32) * np.float32(scale)
        elif site in ("embed", "head"):
            leaf = rng.standard_normal(shape, np.float32) * np.float32(0.02)
        else:
            fill = 0.0 if path.endswith("/bias") else 1.0
            leaf = np.full((*stack, *shape), fill, np.float32)
        digest.update(leaf.tobytes())
        set_path(params, path, leaf.astype(dtype, copy=False))
    return params, digest.hexdigest()


def _described(config) -> str:
    """The config as text: fields that came after format 1 only where they are set, so that old runs keep their base."""
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    added = {field.name: field.default for field in dataclasses.fields(config) if field.name in _ADDED}
    kept = [f"{name}={value!r}" for name, value in fields.items() if name not in added or value != added[name]]
    return f"DecoderConfig({', '.join(kept)})"
