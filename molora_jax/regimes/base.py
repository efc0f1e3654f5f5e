"""The regime contract: how training is organised.

    stages(config, data)                       every step of the run, cut into stages
    source(data, config, stage)                the rows of a stage
    each(config)                               what is done to every example's gradient; None: they are summed
    memory(run), begin(run, state, memory)     what is remembered beside the training state: its shapes, its first value
    between(run, stage, state, memory)         the work at a stage's end

A stage is compiled by what it is made of, never by its name: 20 rounds are one program. The memory is an item of every
checkpoint, so that a killed run goes on from the same bits; its leaves keep their shapes. `run` is the training loop's
(`training/run.py`); a regime may read

    run.config, run.data, run.stages, run.workdir
    run.compiled(stage)      .shapes (a state's, as jax.ShapeDtypeStruct), .frozen (patterns), .program.model
    run.source(stage)        what `source` gave
    run.measured(run.compiled(stage).program, state, tasks)     {task: {accuracy, nll}} on held-out items
    run.fresh_moments(run.compiled(stage), state)               the state with an optimizer state that begins anew

and of `data` (`data/dataset.py`)

    data.task_names[: data.num_trained]      the tasks that have rows to train on
    data.train.for_tasks("a,b")              their rows; a stage's `tasks` are such a list
    data.heldout_of(name, "valid", n)        up to n held-out items of a task

`state.leaves` are adapters and modules; `trees.split(state.leaves, compiled.frozen)` is `(what trains, what does not)`.
"""

import dataclasses
from typing import Any, ClassVar

import numpy as np
from flax.traverse_util import flatten_dict

from molora_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Stage:
    """Steps `start` to `stop - 1`. `config` is the run's with the stage's `set` applied; `tasks` "" means all.

    `route="task"` sends every token to the expert of its task in the routers' place: experts train apart. With "apart"
    routers decide, but a token may choose the expert of its task alone. `rows` "0-60": of these tasks the prompts whose
    hash lies in that range of percent; "" means all.
    """

    name: str
    start: int
    stop: int
    tasks: str
    freeze: tuple[str, ...]
    route: str
    config: Any
    rows: str = ""


@dataclasses.dataclass(frozen=True)
class Regime:
    """Options are the dataclass fields of a member, values of `config.regime`.

    `SCHEDULE`: whether the config's stages are its own (else it makes them, and the config has one). `EXACT`: whether
    `train.exact` computes it. `PROCESSES`: whether several processes do. `HELD_OUT`: whether it measures held-out rows.
    `PATIENCE`: whether held-out rounds may end it (`train.patience`).
    `PENALTY`: whether it keeps what a penalty on parameters remembers; `SQUARES`: whether it gives that squared
    gradients (`losses.base.Penalty`).
    """

    SCHEDULE: ClassVar[bool] = False
    EXACT: ClassVar[bool] = False
    PROCESSES: ClassVar[bool] = False
    HELD_OUT: ClassVar[bool] = False
    PATIENCE: ClassVar[bool] = False
    PENALTY: ClassVar[bool] = False
    SQUARES: ClassVar[bool] = False

    @property
    def side_by_side(self) -> int:
        """How many runs share a turn of the loop, each making one optimizer step of its own; 0: the run alone."""
        return 0

    def settled(self, steps: int) -> int:
        """The optimizer steps that it can make of `train.steps`, at least 1."""
        return steps

    def check(self, config, data, model) -> None:
        """Raises InputError for what it cannot train, before anything is compiled."""

    def stages(self, config, data) -> tuple[Stage, ...]:
        raise NotImplementedError

    def source(self, data, config, stage: Stage):
        """What gives a turn's rows: `iterate(turn, rows=...)`, `batch(turn)`. One object for stages of equal rows."""
        of_tasks = data.train.for_tasks(stage.tasks) if stage.tasks else data.train
        return of_tasks.part(*map(int, stage.rows.split("-"))) if stage.rows else of_tasks

    def each(self, config, data):
        """Of `core.privacy.Private`, hashable; or None."""

    def memory(self, run) -> dict:
        """What the run remembers before its first step, as a nested dict of arrays; {} for nothing.

        Asked too when a run goes on: then its leaves say what the checkpoint holds.
        """
        return {}

    def begin(self, run, state, memory: dict) -> dict:
        """The memory with what it keeps of the state before the first step (after `train.init_from`)."""
        return memory

    def between(self, run, stage: Stage, state, memory: dict):
        """`(state, memory, row)` at the end of a stage: `row`, of new names, joins the metrics of its last step."""
        return state, memory, {}

    def report(self, run, memory: dict) -> str:
        """Writes its own files below `run.workdir/report` and says what the run came to, "" for nothing."""
        return ""


def checked(stages: tuple[Stage, ...], steps: int) -> tuple[Stage, ...]:
    """The stages of a regime, one after the other from 0 to `steps`, each of a name of its own.

    Raises:
      InputError: others.
    """
    stages = tuple(stages)
    names = [stage.name for stage in stages]
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise _unfit(f"two stages {twice!r}", "a name of its own for each")
    at = 0
    for stage in stages:
        if stage.start != at or stage.stop < at:
            raise _unfit(f"a stage {stage.name!r} of steps {stage.start} to {stage.stop} after step {at}", "no gap")
        at = stage.stop
    if at != steps:
        raise _unfit(f"stages that end at step {at}", f"train.steps={steps} as the end of the last one")
    return stages


def remembered(before: dict, after: dict) -> None:
    """Raises InputError where a memory lost, gained or reshaped a leaf: no checkpoint of it could be gone on from."""
    old, new = ({path: _form(leaf) for path, leaf in flatten_dict(m, sep="/").items()} for m in (before, after))
    path = next((path for path in sorted(old | new) if old.get(path) != new.get(path)), None)
    if path is not None:
        got, expected = (m.get(path, "no such leaf") for m in (new, old))
        raise _unfit(f"{got} as memory/{path}", f"{expected}, as memory(run) says")


def three(left) -> tuple:
    """What `between` returned, `(state, memory, row)`. Raises InputError for anything else."""
    if not (isinstance(left, tuple) and len(left) == 3 and isinstance(left[1], dict) and isinstance(left[2], dict)):
        got = f"{len(left)} values" if isinstance(left, tuple) else f"a {type(left).__name__}"
        raise _unfit(f"{got} of `between`", "(state, memory, row), the last two dicts")
    return left


def added(row: dict, own: dict) -> dict:
    """A row of metrics with a regime's `own` entries. Raises InputError where one would replace another's."""
    twice = sorted(row.keys() & own.keys())
    if twice:
        raise _unfit(f"{twice[0]!r} in the row of `between`", "a name that no metric of a step has")
    return row | own


def _form(leaf) -> str:
    leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    return f"{leaf.dtype}{list(leaf.shape)}"


def _unfit(got: str, expected: str) -> InputError:
    fix = "Mend the regime (its contract: molora_jax/regimes/base.py)."
    return InputError("regime.name", got=f"a regime that gives {got}", expected=expected, fix=fix)


def one_stage(config, name: str, start: int, stop: int, tasks: str = "") -> Stage:
    """A part of a run whose config has one stage: what that freezes stays frozen."""
    (stage,) = config.schedule.values()
    freeze = tuple(p.strip() for p in stage.freeze.split(",") if p.strip())
    return Stage(name, start, stop, tasks or stage.tasks, freeze, stage.route, config)
