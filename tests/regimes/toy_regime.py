"""`swa`: in the end the mean of what stood at the ends of equal parts of the run (Izmailov et al. 2018, 1803.05407)."""

import dataclasses
from typing import ClassVar

import jax
import numpy as np

from molora_jax.core import trees
from molora_jax.regimes.base import Regime, one_stage


@dataclasses.dataclass(frozen=True)
class Swa(Regime):
    parts: int = 4

    LIMITS: ClassVar = {"parts": (1, None)}

    def stages(self, config, data):
        ends = [config.train.steps * (i + 1) // self.parts for i in range(self.parts)]
        parts = enumerate(zip([0, *ends], ends, strict=False))
        return tuple(one_stage(config, f"p{i:02d}", start, stop) for i, (start, stop) in parts if stop > start)

    def memory(self, run):
        compiled = run.compiled(run.stages[0])
        trainable, _ = trees.split(compiled.shapes.leaves, compiled.frozen)
        return {"mean": jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), trainable), "ends": np.int32(0)}

    def between(self, run, stage, state, memory):
        trainable, still = trees.split(state.leaves, run.compiled(stage).frozen)
        ends = np.int32(memory["ends"] + 1)
        mean = jax.tree.map(lambda mean, leaf: mean + (leaf - mean) / ends, memory["mean"], trainable)
        if stage is run.stages[-1]:
            adapters, modules = trees.apart(trees.merge(mean, still))
            state = state.replace(adapters=adapters, modules=modules)
        return state, {"mean": mean, "ends": ends}, {}
