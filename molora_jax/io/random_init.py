"""Random parameters for any backbone: the base of tests and of dry runs.

What a leaf is drawn from, its `Leaf` says: kernels are normal with standard deviation `D_in ** -0.5`, those that write
to the residual stream (`o`, `down`) divided by `sqrt(2 L)`, embeddings 0.02, norms 1, biases 0. Logits are then of
order 0.1.
"""

import dataclasses
import hashlib

import numpy as np

from molora_jax.backbones.base import Backbone
from molora_jax.core.trees import set_path

_ADDED = (  # fields of Llama that came after format 1
    "o_bias", "window", "sliding", "unrotated", "norms", "plus_one", "scaled_embedding", "query_scalar", "score_cap",
    "logit_cap", "qk_norm_all", "rotated", "fused", "local_base",
)  # fmt: skip


def random_params(backbone: Backbone, *, seed: int = 0, dtype="float32") -> tuple[dict, str]:
    """`(params, digest)`; numpy, the tree of `shapes()`. The values do not depend on `dtype` but for rounding."""
    rng = np.random.Generator(np.random.PCG64(seed))
    params, digest = {}, hashlib.sha256(_described(backbone).encode())
    for path, leaf in backbone.shapes().items():
        if leaf.scale is None:
            values = np.full(leaf.shape, leaf.fill, np.float32)
        else:
            values = rng.standard_normal(leaf.shape, np.float32) * np.float32(leaf.scale)
        digest.update(values.tobytes())
        set_path(params, path, values.astype(dtype, copy=False))
    return params, digest.hexdigest()


def _described(config) -> str:
    """The config as text: fields that came after format 1 only where they are set, so that old runs keep their base."""
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    added = {field.name: field.default for field in dataclasses.fields(config) if field.name in _ADDED}
    kept = [name for name, value in fields.items() if name not in added or value != added[name]]
    kept = [name for name in kept if name not in config.DESCRIBED_LAST] + list(config.DESCRIBED_LAST)
    return f"{config.TITLE or type(config).__name__}({', '.join(f'{name}={fields[name]!r}' for name in kept)})"
