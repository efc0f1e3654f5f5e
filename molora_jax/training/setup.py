"""All that a run needs before its first step: mesh, base, data, model, in the order in which mistakes are cheapest."""

import dataclasses
from typing import Any

import jax

from molora_jax import config as config_lib
from molora_jax import data as data_lib
from molora_jax import sharding
from molora_jax.backbones.base import needs_head
from molora_jax.backbones.compile import compile_model
from molora_jax.backbones.model import Model
from molora_jax.engines import Engine, auto
from molora_jax.errors import InputError
from molora_jax.io.base import load_base
from molora_jax.io.base_facts import base_facts, pinned
from molora_jax.training.settle import settle


@dataclasses.dataclass(frozen=True)
class Setup:
    """`config` has its steps (`train.epochs`); `params` is on the mesh; `base` keeps tokenizer, shape and digest."""

    config: Any
    mesh: Any
    base: Any
    data: Any
    model: Model
    params: dict
    engines: str | None  # the table of engines, to print
    day: str | None = None  # that the chat template is pinned to, where it depends on the day

    @property
    def identity(self) -> dict:
        """What makes two runs the same beside their configs."""
        facts = base_facts(self.base, day=self.day)
        return {"base_digest": self.base.digest, "data_fingerprint": self.data.fingerprint, "base": facts}


def setup(config, *, devices=None, day: str | None = None) -> Setup:
    """Args:
      day: that an earlier start of the run recorded, for a chat template that depends on it; None is today.

    Raises:
      InputError: before anything is compiled.
    """
    devices = jax.devices() if devices is None else devices
    mesh = sharding.make_mesh(config_lib.check_mesh(config, len(devices)), devices)
    base = load_base(config.base.source, dtype=config.base.dtype, seed=config.seed)
    if config.get("objective", {"name": "lm"})["name"] == "lm":
        needs_head(base.config, "objective lm", "base.source")
    base, day = pinned(base, day)
    config_lib.check_model(config, base.config.layers, base.config.dims, base.config.ABSENT)
    places = sharding.param_shardings(base.config, base.params, mesh)  # refuses a mesh that does not divide the base
    if config.data.seq_len > base.config.context:
        raise InputError(
            "data.seq_len", got=str(config.data.seq_len), expected=f"at most {base.config.context}, the model's context"
        )
    data = data_lib.build(config.data, tokenizer=base.tokenizer, batch_size=config.train.batch_size, seed=config.seed)
    config, tasks = settle(config, data)
    model = compile_model(config, base.config, max_segments=data.train.max_segments, tasks=tasks)
    model, engines = place(config, model, mesh)
    if config.train.get("exact", False):  # not in runs of older versions
        places = sharding.replicated(mesh)
    params = sharding.put(base.params, places)
    return Setup(config, mesh, dataclasses.replace(base, params=None), data, model, params, engines, day)


def place(config, model: Model, mesh) -> tuple[Model, str | None]:
    """The model with the config's engine, and the table of engines to print.

    With `train.exact` a device computes alone: no engine moves anything, and there is no table.
    """
    if config.train.get("exact", False):
        return dataclasses.replace(model, engine=Engine("replicate", mesh)), None
    rows = config.train.batch_size // config.train.accumulate // sharding.ways(mesh, sharding.ROWS)
    on, text = auto.resolve(
        model, engine=config.engine, mesh=mesh, capacity=config.expert_parallel.capacity,
        rank_space=config.expert_parallel.rank_space, tokens=rows * config.data.seq_len,
        itemsize=2 if config.base.dtype == "bfloat16" else 4,
    )  # fmt: skip
    return dataclasses.replace(model, engine=on), text
