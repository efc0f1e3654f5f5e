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
from molora_jax.config import objectives as objectives_config
from molora_jax.engines import Engine, auto
from molora_jax.errors import InputError
from molora_jax.io.base import configured_base
from molora_jax.io.base_facts import base_facts, pinned
from molora_jax.objectives import compile_objective
from molora_jax.runs.modules import Modules, compile_modules
from molora_jax.training.frozen import START, load_frozen
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
    modules: Modules = Modules()
    frozen: dict = dataclasses.field(default_factory=dict)  # source -> the frozen model that an objective asks for
    digests: dict = dataclasses.field(default_factory=dict)  # source -> of what it is made of

    @property
    def identity(self) -> dict:
        """What makes two runs the same beside their configs."""
        facts = base_facts(self.base, day=self.day)
        extra = {"base_digest": self.base.digest, "data_fingerprint": self.data.fingerprint, "base": facts}
        if self.data.classes:
            extra["labels"] = list(self.data.classes)
        if any(getattr(rule.router, "TASKS", ()) for rule in self.model.rules):  # whose experts are of tasks by name
            extra["tasks"] = list(self.model.tasks)
        others = sorted(digest for source, digest in self.digests.items() if source != "base")
        return extra | ({"frozen": others} if others else {})


def setup(config, *, devices=None, recorded: dict | None = None, beside: Setup | None = None) -> Setup:
    """Args:
      beside: of another run on the same base and mesh, whose arrays this one shares.
      recorded: the identity that an earlier start of the run recorded; its day is kept where a chat template depends
        on the day.

    Raises:
      InputError: before anything is compiled.
    """
    devices = jax.devices() if devices is None else devices
    if beside is None:
        sizes = config_lib.check_mesh(config, len(devices))
        mesh = sharding.make_mesh(sizes, devices, slices=config.mesh.get("dcn", 1))
    else:
        mesh = beside.mesh
    known, day = _recorded(recorded or {})
    if beside is None:
        base = configured_base(config, known, stored=True)
    else:
        base = dataclasses.replace(beside.base, params=beside.params)
    for where, value in objectives_config.used(config).items():
        if compile_objective(value, where=where).needs_tokens:
            needs_head(base.config, f"objective {value['name']}", "base.source")
    if "all" in objectives_config.train_base(config) and any(stack.by_expert for stack in base.config.stacks):
        raise InputError(
            "method.train_base", got="'all' on a base that routes", expected="some of embed, head, norms",
            fix="The kernels of its experts are read one by one and get no gradient: adapt them with a rule whose "
            "placement is base_experts.",
        )  # fmt: skip
    base, day = pinned(base, day)
    config_lib.check_model(config, base.config.layers, base.config.dims, base.config.ABSENT)
    shardings = sharding.param_shardings(base.config, base.params, mesh)  # refuses a mesh that does not divide the base
    if config.data.seq_len > base.config.context:
        raise InputError(
            "data.seq_len", got=str(config.data.seq_len), expected=f"at most {base.config.context}, the model's context"
        )
    data = data_lib.build(
        config.data, tokenizer=base.tokenizer, batch_size=config.train.batch_size, seed=config.seed,
        reads=objectives_config.reads(config), unit=objectives_config.unit(config),
    )  # fmt: skip
    config, tasks = settle(config, data)
    model = compile_model(config, base.config, max_segments=data.train.max_segments, tasks=tasks)
    model, engines = with_engine(config, model, mesh)
    if config.train.get("exact", False):  # not in runs of older versions
        shardings = sharding.replicated(mesh)
    modules = compile_modules(config, base.params, width=base.config.width, classes=len(data.classes))
    params = sharding.put(base.params, shardings) if beside is None else beside.params
    frozen, digests = ({}, {}) if beside is None else (dict(beside.frozen), dict(beside.digests))
    for where, value in objectives_config.used(config).items():
        for name, source in compile_objective(value, where=where).frozen().items():
            if source != START and source not in frozen:
                made = load_frozen(source, config, base, params, model, mesh, where=f"{where}.{name}", known=known)
                frozen[source], digests[source] = made
    base = dataclasses.replace(base, params=None)
    return Setup(config, mesh, base, data, model, params, engines, day, modules, frozen, digests)


def _recorded(identity: dict) -> tuple[list[str], str | None]:
    """The digests of the base and of the frozen models, and the day, of an identity (a text that anybody may edit)."""
    base, extra = (identity.get(name) if isinstance(identity.get(name), dict) else {} for name in ("base", "extra"))
    frozen = extra.get("frozen")
    digests = [base.get("digest"), *(frozen if isinstance(frozen, list) else [])]
    return [digest for digest in digests if isinstance(digest, str)], base.get("day")


def with_engine(config, model: Model, mesh) -> tuple[Model, str | None]:
    """The model with the config's engine, and the table of engines to print.

    With `train.exact` a device computes alone: no engine moves anything, and there is no table.
    """
    if config.train.get("exact", False):
        return dataclasses.replace(model, engine=Engine("replicate", mesh)), None
    rows = config.train.batch_size // config.train.accumulate // sharding.ways(mesh, sharding.ROWS)
    on, text = auto.resolve(
        model, engine=config.engine, mesh=mesh, capacity=config.expert_parallel.capacity,
        rank_space=config.expert_parallel.rank_space, tokens=rows * config.data.seq_len,
        itemsize=2 if config.base.dtype == "bfloat16" else 4, quant=config.base.get("quant", "none"),
    )  # fmt: skip
    return dataclasses.replace(model, engine=on), text
