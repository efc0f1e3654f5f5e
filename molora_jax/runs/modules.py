"""The collection `modules`: what trains and is no adapter.

    modules/<objective>/<leaf>     the head of an objective (`objectives/*.py`: `init_heads`)
    modules/base/<path>            a trained copy of the base's leaf <path>, float32 (`method.train_base`)

A copy starts at the base's values and is read in their place; the base itself stays as it is, so that a reference or a
report of the base is still there. `train_base="embed,head,norms"` is what peft calls `modules_to_save`; "all" without
rules is full fine-tuning.
"""

import dataclasses
import zlib
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from molora_jax.config import objectives as objectives_config
from molora_jax.core import trees
from molora_jax.errors import InputError
from molora_jax.objectives import compile_objective


@dataclasses.dataclass(frozen=True)
class Modules:
    """`heads`: (name, objective) of each that has one; `copies`: paths of the base's leaves that train."""

    heads: tuple[tuple[str, Any], ...] = ()
    copies: tuple[str, ...] = ()
    width: int = 0
    classes: int = 0

    def init(self, key, params: dict) -> dict:
        """Fresh leaves; traceable. {} where nothing but adapters trains."""
        out = {}
        for name, objective in self.heads:
            own = jax.random.fold_in(key, zlib.crc32(name.encode()) & 0x7FFFFFFF)
            leaves = objective.init_heads(own, self.width, self.classes)
            out |= {name: leaves} if leaves else {}
        if self.copies:
            flat = flatten_dict(params, sep="/")
            out["base"] = unflatten_dict({p: flat[p].astype(jnp.float32) + 0 for p in self.copies}, sep="/")
        return out

    def shapes(self, params: dict) -> dict:
        return jax.eval_shape(self.init, jax.random.key(0), params)

    def frozen_in(self, name: str) -> tuple[str, ...]:
        """Patterns of the leaves that a stage of another objective leaves alone."""
        return tuple(f"modules/{other}/*" for other, _ in self.heads if other != name)


def compile_modules(config, params: dict, *, width: int, classes: int) -> Modules:
    """What the validated config trains beside its rules.

    Args:
      params: the base's leaves, or their shapes. classes: of the data, 0 where their rows have none.

    Raises:
      InputError: a base without such a leaf; options of an objective that exclude each other.
    """
    heads = {}
    for where, value in objectives_config.trained(config).items():
        objective = compile_objective(value, where=where)
        if value["name"] not in heads and jax.eval_shape(
            lambda key, o=objective: o.init_heads(key, width, max(classes, 1)), jax.random.key(0)
        ):
            heads[value["name"]] = objective
    copies = base_leaves(objectives_config.train_base(config), params)
    return Modules(tuple(sorted(heads.items())), copies, width, classes)


def base_leaves(names: tuple[str, ...], params: dict) -> tuple[str, ...]:
    """The paths that `method.train_base` means on this base, in order."""
    paths = sorted(flatten_dict(params, sep="/"))
    parts = {
        "embed": lambda path: path.split("/")[0] == "embed",
        "head": lambda path: path.split("/")[0] == "head",
        "norms": lambda path: any("norm" in part for part in path.split("/")),
        "all": lambda path: True,
    }
    found = set()
    for name in names:
        own = {path for path in paths if parts[name](path)}
        if not own:
            tied = "A base whose head is its embedding (tied): name embed. An encoder has none."
            fix = tied if name == "head" else "Leave it out."
            raise InputError(
                "method.train_base", got=f"{name!r}, which this base has no leaf of", expected="leaves of the base",
                fix=fix,
            )  # fmt: skip
        found |= own
    return tuple(sorted(found))


def in_place(params: dict, modules: dict) -> dict:
    """The base's leaves as the run reads them: trained copies in their places."""
    return trees.overlay(params, modules.get("base", {}))
