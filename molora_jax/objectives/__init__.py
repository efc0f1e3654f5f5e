"""How does a batch become a loss?"""

from molora_jax.objectives.base import Forward, Frozen, Objective
from molora_jax.objectives.classify import Classify
from molora_jax.objectives.distill import Distill
from molora_jax.objectives.lm import LM
from molora_jax.objectives.preference import Preference

__all__ = ["OBJECTIVES", "Forward", "Frozen", "Objective"]

OBJECTIVES = {"lm": LM, "classify": Classify, "preference": Preference, "distill": Distill}
