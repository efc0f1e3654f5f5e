"""LoRA+ (Hayou et al. 2024, arXiv 2402.12354): AdamW with lr_B = ratio * lr_A; other leaves move at lr_A.

The paper suggests a ratio of 2^4 with alpha = 2 R and a base rate about half of LoRA's.
"""

import dataclasses
from typing import ClassVar

import jax
import optax

from molora_jax.core.trees import paths
from molora_jax.optim.adamw import AdamW


@dataclasses.dataclass(frozen=True)
class LoraPlus(AdamW):
    ratio: float = 16.0

    LIMITS: ClassVar = {"ratio": (0, None, "()")}

    def make(self, total_steps, pairs):
        return optax.chain(super().make(total_steps, pairs), scale_second(pairs, self.ratio))


def scale_second(pairs, ratio: float) -> optax.GradientTransformation:
    """Multiplies the updates of every pair's B by `ratio`, after whatever came before."""
    second = {B for _, B in pairs}

    def update(updates, state, params=None):
        leaves, tree = jax.tree.flatten(updates)
        scaled = [u * ratio if path in second else u for path, u in zip(paths(updates), leaves, strict=True)]
        return jax.tree.unflatten(tree, scaled), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
