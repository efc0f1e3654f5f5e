"""All that a run needs before its first step: mesh, base, data, model, in the order in which mistakes are cheapest."""

import dataclasses
from typing import Any

import jax

from molora_jax import config as config_lib
from molora_jax import data as data_lib
from molora_jax import sharding
from molora_jax.engines import auto
from molora_jax.errors import InputError
from molora_jax.io.base import load_base
from molora_jax.models.compile import compile_model
from molora_jax.models.model import Model


@dataclasses.dataclass(frozen=True)
class Setup:
    """`params` is on the mesh; `base` keeps the tokenizer, the shape and the digest."""

    config: Any
    mesh: Any
    base: Any
    data: Any
    model: Model
    params: dict
    engines: str | None  # the table of engines, to print

    @property
    def identity(self) -> dict:
        """What makes two runs the same beside their configs."""
        return {"base_digest": self.base.digest, "data_fingerprint": self.data.fingerprint}


def setup(config, *, devices=None) -> Setup:
    """Raises InputError before anything is compiled."""
    devices = jax.devices() if devices is None else devices
    mesh = sharding.make_mesh(config_lib.check_mesh(config, len(devices)), devices)
    base = load_base(config.base.source, dtype=config.base.dtype, seed=config.seed)
    config_lib.check_model(config, base.config.layers, base.config.dims)
    if config.data.seq_len > base.config.context:
        raise InputError(
            "data.seq_len", got=str(config.data.seq_len), expected=f"at most {base.config.context}, the model's context"
        )
    data = data_lib.build(config.data, tokenizer=base.tokenizer, batch_size=config.train.batch_size, seed=config.seed)
    model = compile_model(config, base.config, max_segments=data.train.max_segments)
    model, engines = place(config, model, mesh)
    params = sharding.put(base.params, sharding.param_shardings(base.params, mesh))
    return Setup(config, mesh, dataclasses.replace(base, params=None), data, model, params, engines)


def place(config, model: Model, mesh) -> tuple[Model, str | None]:
    """The model with the config's engine, and the table of engines to print."""
    rows = config.train.batch_size // config.train.accumulate // sharding.ways(mesh, sharding.ROWS)
    on, text = auto.resolve(
        model, engine=config.engine, mesh=mesh, capacity=config.expert_parallel.capacity,
        rank_space=config.expert_parallel.rank_space, tokens=rows * config.data.seq_len,
        itemsize=2 if config.base.dtype == "bfloat16" else 4,
    )  # fmt: skip
    return dataclasses.replace(model, engine=on), text
