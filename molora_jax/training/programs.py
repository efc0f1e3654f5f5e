"""What a stage compiles: a hashable value that says all of it, and the step made from that value.

Stages of equal programs share one compiled step, whatever their names.
"""

import dataclasses
from typing import Any

import jax

from molora_jax import config as config_lib
from molora_jax import runtime, sharding
from molora_jax.backbones.compile import compile_losses, compile_model
from molora_jax.config import objectives as objectives_config
from molora_jax.config import outside
from molora_jax.core import trees
from molora_jax.errors import InputError
from molora_jax.objectives import Objective, compile_objective
from molora_jax.optim import OPTIMIZERS
from molora_jax.runs.modules import Modules, compile_modules
from molora_jax.training.exact import ExactStep
from molora_jax.training.setup import place
from molora_jax.training.step import fresh, make_step

START_KEY = 0x5EED  # folded into the run's seed: of the first state


@dataclasses.dataclass(frozen=True)
class Program:
    """All that a stage's step is compiled from: stages of equal programs share one.

    `model` has the stage's own losses and routing; `head` names its objective's leaves among the modules; `total` is
    the length of the learning rate's schedule.
    """

    model: Any
    modules: Modules
    objective: Objective
    head: str
    optimizer: Any
    total: int
    frozen: tuple[str, ...]
    clip: float


def program_of(run, stage) -> Program:
    """Raises InputError for a stage that trains nothing, or one that this base does not fit."""
    config, model, modules = stage.config, run.model, run.modules
    if config_lib.to_dict(config.method) != config_lib.to_dict(run.config.method):
        config_lib.check_model(config, run.base.config.layers, run.base.config.dims, run.base.config.ABSENT)
        model = compile_model(config, run.base.config, max_segments=model.max_segments, tasks=model.tasks)
        model, _ = place(config, model, run.mesh)
        modules = compile_modules(config, run.params, width=modules.width, classes=modules.classes)
    options, value = dict(config.optim), config.get("objective") or objectives_config.PLAIN
    frozen = model.frozen_patterns() + modules.frozen_in(value["name"]) + stage.freeze
    shapes = jax.eval_shape(lambda p: model.init_adapters(jax.random.key(0), p), run.params)
    trainable, _ = trees.split(trees.joined(shapes, modules.shapes(run.params)), frozen)
    if not trainable:
        raise InputError(
            f"schedule.{stage.name}.freeze", got="patterns that freeze every leaf", expected="something to train"
        )
    return Program(
        model=dataclasses.replace(model, losses=compile_losses(config), route=stage.route),
        modules=modules,
        objective=compile_objective(value, where=f"schedule.{stage.name}: objective"),
        head=value["name"],
        optimizer=outside.member("optim", OPTIMIZERS, options.pop("name"))(**options),
        total=config.train.steps,
        frozen=frozen,
        clip=config.train.clip,
    )


class CompiledStep:
    """A program's optimizer, its state's shapes and places, and its step, compiled at its first use."""

    def __init__(self, run, program: Program):
        self.program, self.model, self.frozen, self.exact = program, program.model, program.frozen, run.exact
        key = jax.random.fold_in(jax.random.key(run.config.seed), START_KEY)
        init = lambda p: self.model.init_adapters(jax.random.key(0), p)  # noqa: E731
        trainable, _ = trees.split(jax.eval_shape(init, run.params), self.frozen)
        self.optimizer = program.optimizer.make(program.total, trees.pairs(self.model, trainable))
        self.start = lambda params: fresh(self.model, self.optimizer, params, self.frozen, key, program.modules.init)
        shapes = jax.eval_shape(self.start, run.params)
        self.shardings = sharding.state_shardings(shapes, self.model, run.mesh)
        self.shapes = jax.tree.map(
            lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, self.shardings
        )
        options = dict(
            seed=run.config.seed, frozen=self.frozen, accumulate=run.config.train.accumulate, clip=program.clip,
            targets_per_row=run.data.train.targets_per_row,
        )  # fmt: skip
        made = self.model, self.optimizer, program.optimizer.schedule(program.total)
        if self.exact:
            self.step = ExactStep(*made, mesh=run.mesh, **options)
        else:
            own = dict(objective=program.objective, head=program.head)
            step = make_step(*made, constrain=run.constrain, **own, **options)
            self.step = jax.jit(step, donate_argnums=0, out_shardings=(self.shardings, sharding.replicated(run.mesh)))
        self.ready = False

    def compile_together(self, *arguments, step: int) -> None:
        """With several processes: the first step of a program starts when all have compiled it."""
        if not self.ready and jax.process_count() > 1:
            self.step = self.step.compile(*arguments) if self.exact else self.step.lower(*arguments).compile()
            runtime.together(f"step {step} is compiled")
        self.ready = True
