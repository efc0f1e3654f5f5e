"""`stages`: a run's stages, in the order of their names: each trains some leaves on some tasks for some steps.

The adapter tree is the union over the stages; a stage's optimizer state exists for its own trainable leaves only and
starts fresh with the stage. A penalty on parameters is given what the stages before left (not squared gradients).
"""

import dataclasses
from typing import ClassVar

from ml_collections import ConfigDict

from molora_jax.config.objectives import in_stage
from molora_jax.errors import InputError
from molora_jax.regimes.base import Regime, Stage


@dataclasses.dataclass(frozen=True)
class Stages(Regime):
    SCHEDULE: ClassVar[bool] = True
    EXACT: ClassVar[bool] = True
    PROCESSES: ClassVar[bool] = True
    PATIENCE: ClassVar[bool] = True
    PENALTY: ClassVar[bool] = True

    def stages(self, config, data):
        return stages(config)

    def memory(self, run):
        penalties = _penalties(run)
        other = next((s.name for s in run.stages if run.programs[s.name].model.rules != run.model.rules), None)
        if penalties and other is not None:
            raise InputError(
                f"schedule.{other}.set.method", got=f"other rules beside losses.{penalties[0][0]}",
                expected="the same rules in every stage: it remembers leaves", fix="Take one of the two out.",
            )  # fmt: skip
        widest = _widest(run)
        return {"penalties": {name: widest.fresh_memory(loss) for name, loss in penalties}} if penalties else {}

    def begin(self, run, state, memory):
        return self._remembered(run, state, memory) if run.config.train.init_from else memory

    def between(self, run, stage, state, memory):
        last = stage is run.stages[-1]
        return state, memory if last else self._remembered(run, state, memory), {}

    def _remembered(self, run, state, memory):
        if not memory:
            return memory
        kept, widest = memory["penalties"], _widest(run)
        return {"penalties": {n: widest.remembered(loss, kept[n], state, {}) for n, loss in _penalties(run)}}


def _penalties(run):
    """`(name, loss)` of the run's penalties that remember: stages differ in their weights alone."""
    return [(name, loss) for name, loss in run.programs[run.stages[0].name].penalties if loss.PENALTY]


def _widest(run):
    """The compiled stage in which most leaves train: a penalty may be about any of them."""
    return max((run.compiled(stage) for stage in run.stages), key=lambda compiled: compiled.num_trained)


def stages(config) -> tuple[Stage, ...]:
    """The validated config's stages; those of `steps=0` share what the others leave of `train.steps` (later: more)."""
    named = sorted(config.schedule.items())
    rest = config.train.steps - sum(stage.steps for _, stage in named)
    open_stages = sum(not stage.steps for _, stage in named)
    out, start = [], 0
    for name, stage in named:
        stop = start + stage.steps
        if not stage.steps:
            stop += rest // open_stages
            rest, open_stages = rest - rest // open_stages, open_stages - 1
        changed = ConfigDict(in_stage(config.to_dict(), name))
        freeze = tuple(p.strip() for p in stage.freeze.split(",") if p.strip())
        out.append(Stage(name, start, stop, stage.tasks, freeze, stage.route, changed, stage.get("rows", "")))
        start = stop
    return tuple(out)


def stage_at(all_stages: tuple[Stage, ...], step: int) -> Stage:
    """The stage that makes the update after `step`; the last one at the end of the run."""
    return next((s for s in all_stages if s.start <= step < s.stop), all_stages[-1])


def stage_of(all_stages: tuple[Stage, ...], step: int) -> Stage:
    """The stage that made the update to `step`, whose leaves it has; the first one before the first update."""
    return next((s for s in all_stages if s.start < step <= s.stop), all_stages[0])
