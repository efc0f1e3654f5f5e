"""The regime contract: how training is organised.

    stages(config, data)                       every step of the run, cut into stages
    source(data, config, stage)                the rows of a stage
    each(config)                               what is done to every example's gradient; None: they are summed
    memory(run), between(run, stage, ...)      what is remembered beside the training state; the work at a stage's end

`run` is the training loop's. A stage is compiled by what it is made of, never by its name: 20 rounds are one program.
The memory is an item of every checkpoint, so that a killed run goes on from the same bits.
"""

import dataclasses
from typing import Any, ClassVar


@dataclasses.dataclass(frozen=True)
class Stage:
    """Steps `start` to `stop - 1`. `config` is the run's with the stage's `set` applied; `tasks` "" means all.

    `route="task"` sends every token to the expert of its task in the routers' place: experts train apart.
    """

    name: str
    start: int
    stop: int
    tasks: str
    freeze: tuple[str, ...]
    route: str
    config: Any


@dataclasses.dataclass(frozen=True)
class Regime:
    """Options are the dataclass fields of a member, values of `config.regime`.

    `SCHEDULE`: whether the config's stages are its own (else it makes them, and the config has one). `EXACT`: whether
    `train.exact` computes it. `PROCESSES`: whether several processes do. `HELD_OUT`: whether it measures held-out rows.
    `PENALTY`: whether it keeps what a penalty on parameters remembers.
    """

    SCHEDULE: ClassVar[bool] = False
    EXACT: ClassVar[bool] = False
    PROCESSES: ClassVar[bool] = False
    HELD_OUT: ClassVar[bool] = False
    PENALTY: ClassVar[bool] = False

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
        return data.train.for_tasks(stage.tasks) if stage.tasks else data.train

    def each(self, config, data):
        """Of `core.privacy.Private`, hashable; or None."""

    def memory(self, run) -> dict:
        """What the run remembers before its first step, as a nested dict of arrays; {} for nothing."""
        return {}

    def between(self, run, stage: Stage, state, memory: dict):
        """`(state, memory, row)` at the end of a stage: `row` is added to the metrics of its last step."""
        return state, memory, {}

    def report(self, run, memory: dict) -> str:
        """Writes its own files below `run.workdir/report` and says what the run came to, "" for nothing."""
        return ""


def one_stage(config, name: str, start: int, stop: int, tasks: str = "") -> Stage:
    """A part of a run whose config has one stage: what that freezes stays frozen."""
    (stage,) = config.schedule.values()
    freeze = tuple(p.strip() for p in stage.freeze.split(",") if p.strip())
    return Stage(name, start, stop, tasks or stage.tasks, freeze, stage.route, config)
