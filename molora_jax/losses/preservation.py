"""LoRA-Mixer's preservation: experts that a router is trained with stay near what they were (arXiv 2507.00029).

    l = sum over i in C of ||theta_i - theta_i^0||^2

theta^0 is where the stage began, if anything was learnt before it: in a run's first stage (without `train.init_from`) l
is 0. Under the regime `continual` it is where the last task ended. theta are all leaves of experts that train, routers
left out; C all of them, or the experts named.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from molora_jax.config.resolve import split_commas
from molora_jax.errors import InputError
from molora_jax.losses.base import Penalty


@dataclasses.dataclass(frozen=True)
class Preservation(Penalty):
    """`experts`: C by number, "0,2,5"; "" is all."""

    weight: float = 1e-2
    experts: str = ""

    SQUARES: ClassVar[bool] = False

    def fresh(self, trainable):
        flat = flatten_dict(trainable, sep="/")
        own = {path: jnp.zeros_like(leaf) for path, leaf in flat.items() if _is_experts(path)}
        return {"start": unflatten_dict(own, sep="/"), "begun": jnp.zeros(())}

    def penalty(self, trainable, memory):
        now, start = (flatten_dict(tree, sep="/") for tree in (trainable, memory["start"]))
        found = [self._distance(path, now[path], start[path]) for path in start if path in now]
        return jnp.where(memory["begun"] > 0, sum(found, jnp.zeros(())), 0.0)

    def remember(self, memory, trainable, squares):
        now = flatten_dict(trainable, sep="/")
        kept = {path: now.get(path, leaf) for path, leaf in flatten_dict(memory["start"], sep="/").items()}
        return {"start": unflatten_dict(kept, sep="/"), "begun": jnp.ones(())}

    def _distance(self, path, now, start):
        """Of a leaf `[L, E, ...]`."""
        chosen = self._chosen(path, now)
        difference = now - start if chosen is None else (now - start)[:, jnp.array(chosen)]
        return jnp.sum(difference**2)

    def _chosen(self, path, leaf):
        """The experts of C, None for all."""
        names = split_commas(self.experts)
        if not names:
            return None
        E = leaf.shape[1]
        if not all(name.isdigit() and int(name) < E for name in names):
            raise InputError(
                "losses.preservation.experts", got=repr(self.experts), expected=f"numbers of experts, 0 to {E - 1}",
                fix=f"{path} has {E}.",
            )  # fmt: skip
        return [int(name) for name in names]


def _is_experts(path: str) -> bool:
    """Whether a leaf is an expert's: not a router's, nor a head or a copy of the base."""
    return "/router/" not in path and not path.startswith("modules/")
