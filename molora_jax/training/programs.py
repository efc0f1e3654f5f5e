"""What a stage compiles: a hashable value that says all of it, and the step made from that value.

Stages of equal programs share one compiled step, whatever their names.
"""

import dataclasses
import fnmatch
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from molora_jax import config as config_lib
from molora_jax import runtime, sharding
from molora_jax.backbones.compile import apart, compile_losses, compile_model
from molora_jax.config import objectives as objectives_config
from molora_jax.config import outside
from molora_jax.core import trees
from molora_jax.engines import ALONE
from molora_jax.errors import InputError
from molora_jax.objectives import Objective, compile_objective
from molora_jax.optim import OPTIMIZERS
from molora_jax.optim.base import Optimizer
from molora_jax.runs import identity
from molora_jax.runs.modules import Modules, compile_modules
from molora_jax.training import many
from molora_jax.training.devices import Devices
from molora_jax.training.exact import ExactStep
from molora_jax.training.setup import with_engine
from molora_jax.training.step import Knobs, fresh, make_step

START_KEY = 0x5EED  # folded into the run's seed: of the first state
OF_A_STAGE = ("method.*", "losses.*", "optim.*", "train.clip")  # what `schedule.sNN.set` may change


@dataclasses.dataclass(frozen=True)
class Program:
    """All that a stage's step is compiled from: stages and runs of equal programs share one.

    `model` has the stage's own losses and routing; weights of losses and the learning rate, which are arguments
    (`Knobs`), stand at 1; `head` names its objective's leaves among the modules; `total` is
    the length of the learning rate's schedule; `penalties` are the losses on parameters; `each` is what is done to
    every example's gradient; `side_by_side` runs share the step, 0 for one by itself (`regimes.base`).
    """

    model: Any
    modules: Modules
    objective: Objective
    head: str
    optimizer: Any
    total: int
    frozen: tuple[str, ...]
    clip: float
    penalties: tuple = ()
    each: Any = None
    side_by_side: int = 0

    @property
    def trains(self) -> tuple:
        """What a program trains: equal where its leaves and those of them that are frozen are."""
        return self.model.rules, self.modules, self.frozen


def compile_optimizer(config) -> Optimizer:
    options = dict(config.optim)
    return outside.member("optim", OPTIMIZERS, options.pop("name"))(**options)


def knobs_of(config, start: int = 0) -> Knobs:
    """Of a stage's config; on the host. `start`: the updates before the stage."""
    return Knobs.of(config.seed, compile_optimizer(config).begun(start), compile_losses(config))


def program_of(run, stage) -> Program:
    """Raises InputError for a stage that trains nothing, that freezes nothing of what it says, or of another base."""
    config, model, modules = stage.config, run.model, run.modules
    if config_lib.to_dict(config.method) != config_lib.to_dict(run.config.method):
        config_lib.check_model(config, run.base.config.layers, run.base.config.dims, run.base.config.ABSENT)
        model = compile_model(config, run.base.config, max_segments=model.max_segments, tasks=model.tasks)
        model, _ = with_engine(config, model, run.mesh)
        modules = compile_modules(config, run.params, width=modules.width, classes=modules.classes)
    optimizer, value = compile_optimizer(config), config.get("objective") or objectives_config.PLAIN
    frozen = model.frozen_patterns() + modules.frozen_in(value["name"]) + stage.freeze
    shapes = jax.eval_shape(lambda p: model.init_adapters(jax.random.key(0), p), run.params)
    leaves = trees.joined(shapes, modules.shapes(run.params))
    field = f"schedule.{stage.name if run.regime.SCHEDULE else next(iter(config.schedule))}.freeze"
    _check_freeze(run, stage.freeze, leaves, field=field)
    _check_set(run, stage)
    trainable, _ = trees.split(leaves, frozen)
    if not trainable:
        loads = next((rule.name for rule in model.rules if rule.load), None)
        if loads is None:
            raise InputError(field, got="patterns that freeze every leaf", expected="something to train")
        run.note(  # a run that only joins others is written as it is
            f"warning: nothing trains: what method.rules.{loads}.load brings stays as it is, and its steps change "
            f"nothing. To train it set method.rules.{loads}.loaded='trained'."
        )
    losses = tuple((name, dataclasses.replace(loss, weight=1.0)) for name, loss in compile_losses(config))
    losses, penalties = apart(losses)
    each = run.regime.each(config, run.data)
    if each is not None:  # an example's gradient is formed on one device, whatever the mesh
        model = dataclasses.replace(model, engine=ALONE)
    return Program(
        model=dataclasses.replace(model, losses=losses, route=stage.route),
        modules=modules,
        objective=compile_objective(value, where=f"schedule.{stage.name}: objective"),
        head=value["name"],
        optimizer=dataclasses.replace(optimizer, learning_rate=1.0),
        total=(stage.stop - stage.start if optimizer.restart else config.train.steps) // (run.regime.side_by_side or 1),
        frozen=frozen,
        clip=config.train.clip,
        penalties=penalties,
        each=each,
        side_by_side=run.regime.side_by_side,
    )


def _check_freeze(run, patterns: tuple[str, ...], leaves: dict, *, field: str):
    """Says which patterns freeze nothing: what they mean trains.

    Where all of a stage's do, a new run is refused. One among others may be for leaves that some options have.
    """
    idle = [pattern for pattern in patterns if not trees.split(leaves, (pattern,))[1]]
    if not idle:
        return
    paths = ", ".join(sorted(flatten_dict(leaves, sep="/"))[:2])
    got, fix = f"{', '.join(idle)}, which no leaf matches", "Mend the pattern, or leave it out."
    error = InputError(field, got=got, expected=f"paths such as {paths}", fix=fix)
    if len(idle) == len(patterns) and run.newest is None:
        raise error
    run.note(f"warning: {error}")


def _check_set(run, stage):
    """A stage cannot change what all stages share. A run that began with such a `set`, without effect, goes on."""
    changed = run.config.schedule[stage.name]["set"].to_dict() if run.regime.SCHEDULE else {}
    for path in identity.flat(changed):
        if not any(fnmatch.fnmatchcase(path, pattern) for pattern in OF_A_STAGE):
            field, fix = f"schedule.{stage.name}.set.{path}", "Set it for the whole run, or take it out."
            if path.startswith("objective"):
                fix = f"Write schedule.{stage.name}.objective."
            expected = f"one of {', '.join(OF_A_STAGE)}"
            error = InputError(field, got="a field that all stages share", expected=expected, fix=fix)
            if run.newest is None:
                raise error
            run.note(f"warning: {error}")


def compiled_step(run, program: Program) -> "CompiledStep":
    """The step of a program under a run's mesh and batch; the last few are kept for other runs of this process."""
    shapes, tree = jax.tree.flatten(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), run.params))
    return _compiled_step(
        program, (tuple(shapes), tree), run.mesh, run.config.train.accumulate, run.targets_per_row, run.exact
    )


@functools.lru_cache(maxsize=4)
def _compiled_step(program, shapes, mesh, accumulate, targets_per_row, exact):
    leaves, tree = shapes
    return CompiledStep(program, jax.tree.unflatten(tree, leaves), mesh, accumulate, targets_per_row, exact)


class CompiledStep:
    """A program's optimizer, its state's shapes and shardings, and its step, compiled at its first use; no arrays.

    `params`: of shapes. `shapes`, `shardings` are of one run; `loop_shapes`, `loop_shardings` of what the loop carries:
    with runs side by side their axis is in front.
    """

    def __init__(self, program: Program, params: dict, mesh, accumulate: int, targets_per_row: int, exact: bool):
        self.program, self.model, self.frozen, self.exact = program, program.model, program.frozen, exact
        self.mesh = mesh
        init = lambda p: self.model.init_adapters(jax.random.key(0), p)  # noqa: E731
        trainable, _ = trees.split(jax.eval_shape(init, params), self.frozen)
        pairs = trees.pairs(self.model, trainable)
        self.optimizer = program.optimizer.make(program.total, pairs)  # whose state no rate changes

        def rated(rates):
            member = program.optimizer.at(rates)
            return member.make(program.total, pairs), member.schedule(program.total)

        shapes = jax.eval_shape(self.start, params, 0)
        self.shardings = sharding.state_shardings(shapes, self.model, mesh)
        self.shapes = jax.tree.map(
            lambda s, own: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=own), shapes, self.shardings
        )
        self.loop_shapes, self.loop_shardings, N = self.shapes, self.shardings, program.side_by_side
        if N:
            self.loop_shardings = many.shardings(self.shardings)
            wide = lambda s, own: jax.ShapeDtypeStruct((N, *s.shape), s.dtype, sharding=own)  # noqa: E731
            self.loop_shapes = jax.tree.map(wide, self.shapes, self.loop_shardings)
        options = dict(
            frozen=self.frozen, accumulate=accumulate, clip=program.clip, targets_per_row=targets_per_row, rated=rated
        )
        parts = self.model, self.optimizer, None
        if self.exact:
            self.step = ExactStep(*parts, mesh=mesh, penalties=program.penalties, **options)
        else:
            own = dict(objective=program.objective, head=program.head, penalties=program.penalties, each=program.each)
            constrain = sharding.constrain(mesh) if program.each is None else lambda x: x
            self.plain = make_step(*parts, constrain=constrain, **own, **options)  # for `many.over_runs`
            step = many.over_runs(self.plain) if N else self.plain
            shardings = self.loop_shardings, sharding.replicated(mesh)
            self.step = jax.jit(step, donate_argnums=0, out_shardings=shardings)
        made = Devices(mesh).once if exact else lambda function, shardings: jax.jit(function, out_shardings=shardings)
        self.make_start = made(self.start, self.shardings)  # as `start`, on the mesh
        self.make_opt = made(self.optimizer.init, self.shardings.opt)
        self.ready = False
        self._once, self.squares = {}, None

    def start(self, params, seed):
        """The state of a run's step 0, but for starts that read the base's gradient (`training.probe`)."""
        own = self.program.modules.init
        return fresh(self.model, self.optimizer, params, self.frozen, self.start_key(seed), own)

    @staticmethod
    def start_key(seed):
        """The random key of a run's start."""
        return jax.random.fold_in(jax.random.key(seed), START_KEY)

    def spread(self, state):
        """One run's state as that of all runs side by side."""
        N = self.program.side_by_side
        every = lambda tree: trees.repeated(tree, N)  # noqa: E731
        return jax.jit(every, out_shardings=self.loop_shardings)(state) if N else state

    def once(self, function, state, *given):
        """`function(state, *given, frozen, optimizer)`, jitted and kept: the next state of the loop. given: arrays."""
        if function not in self._once:  # kept for other runs of this program: nothing of one run may be inside
            made = lambda *arrays: function(*arrays, self.frozen, self.optimizer)  # noqa: E731
            self._once[function] = jax.jit(made, out_shardings=self.loop_shardings)
        return self._once[function](state, *given)

    def fresh_memory(self, penalty) -> dict:
        """What a penalty remembers at first, on the mesh."""
        return jax.jit(lambda: penalty.fresh(jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), self._trainable)),
                       out_shardings=self._remembered(penalty))()  # fmt: skip

    def remembered(self, penalty, memory: dict, state, squares: dict) -> dict:
        trainable, _ = trees.split(state.leaves, self.frozen)
        return jax.jit(penalty.remember, out_shardings=self._remembered(penalty))(memory, trainable, squares)

    @property
    def num_trained(self) -> int:
        """How many leaves train."""
        return len(jax.tree.leaves(self._trainable))

    @property
    def _trainable(self) -> dict:
        return trees.split(self.shapes.leaves, self.frozen)[0]

    def _remembered(self, penalty):
        """Where a penalty's memory lies: each leaf as the leaf that it is about, others on every device."""
        shardings = trees.split(self.shardings.leaves, self.frozen)[0]
        shapes = jax.eval_shape(penalty.fresh, self._trainable)
        of = dict(zip(trees.paths(shardings), jax.tree.leaves(shardings), strict=True))

        def of_leaf(path, _):
            names = (trees.name_of(path[i:]) for i in range(len(path)))
            found = (of[name] for name in names if name in of)
            return next(found, sharding.replicated(self.mesh))

        return jax.tree_util.tree_map_with_path(of_leaf, shapes)

    def compile_together(self, *arguments, step: int) -> None:
        """With several processes: the first step of a program starts when all have compiled it."""
        if not self.ready and jax.process_count() > 1:
            self.step = self.step.compile(*arguments) if self.exact else self.step.lower(*arguments).compile()
            runtime.together(f"step {step} is compiled")
        self.ready = True
