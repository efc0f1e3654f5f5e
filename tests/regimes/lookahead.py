"""`lookahead` (Zhang et al. 2019, arXiv 1907.08610): every k steps slow weights go a part of the way, fast ones follow.

slow <- slow + a (fast - slow);   fast <- slow
"""

import dataclasses
from typing import ClassVar

import jax
import numpy as np

from molora_jax.core import trees
from molora_jax.regimes.base import Regime, one_stage


@dataclasses.dataclass(frozen=True)
class Lookahead(Regime):
    every: int = 5
    pace: float = 0.5

    LIMITS: ClassVar = {"every": (1, None), "pace": (0, 1, "(]")}

    def stages(self, config, data):
        steps = config.train.steps
        parts = enumerate(range(0, steps, self.every))
        return tuple(one_stage(config, f"k{i:03d}", at, min(at + self.every, steps)) for i, at in parts)

    def memory(self, run):
        compiled = run.compiled(run.stages[0])
        trainable, _ = trees.split(compiled.shapes.leaves, compiled.frozen)
        return {"slow": jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), trainable)}

    def begin(self, run, state, memory):
        return {"slow": trees.split(state.leaves, run.compiled(run.stages[0]).frozen)[0]}

    def between(self, run, stage, state, memory):
        fast, still = trees.split(state.leaves, run.compiled(stage).frozen)
        slow = jax.tree.map(lambda slow, leaf: slow + self.pace * (leaf - slow), memory["slow"], fast)
        adapters, modules = trees.apart(trees.merge(slow, still))
        return state.replace(adapters=adapters, modules=modules), {"slow": slow}, {}
