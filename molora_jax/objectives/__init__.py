"""How does a batch become a loss?"""

from molora_jax.config import outside
from molora_jax.objectives.base import Forward, Frozen, Objective
from molora_jax.objectives.classify import Classify
from molora_jax.objectives.distill import Distill
from molora_jax.objectives.lm import LM
from molora_jax.objectives.preference import Preference
from molora_jax.objectives.reward_experts import RewardExperts

__all__ = ["OBJECTIVES", "Forward", "Frozen", "Objective", "compile_objective"]

OBJECTIVES = {
    "lm": LM,
    "classify": Classify,
    "preference": Preference,
    "distill": Distill,
    "reward_experts": RewardExperts,
}


def compile_objective(value, *, where: str = "objective") -> Objective:
    """The member that `dict(name=..., options)` names.

    Raises:
      InputError: options that exclude each other.
    """
    options = dict(value)
    made = outside.member("objectives", OBJECTIVES, options.pop("name"))(**options)
    made.check(where)
    return made
