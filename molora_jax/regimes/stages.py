"""`stages`: a run's stages, in the order of their names: each trains some leaves on some tasks for some steps.

The adapter tree is the union over the stages; a stage's optimizer state exists for its own trainable leaves only and
starts fresh with the stage.
"""

import dataclasses
from typing import ClassVar

from ml_collections import ConfigDict

from molora_jax.regimes.base import Regime, Stage


@dataclasses.dataclass(frozen=True)
class Stages(Regime):
    SCHEDULE: ClassVar[bool] = True
    EXACT: ClassVar[bool] = True
    PROCESSES: ClassVar[bool] = True

    def stages(self, config, data):
        return stages(config)


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
        changed = ConfigDict(config.to_dict())
        with changed.unlocked():
            changed.update(stage["set"].to_dict())
            if stage.get("objective"):  # whole: options of another member have no place beside it
                changed.objective = ConfigDict(stage.objective.to_dict())
        freeze = tuple(p.strip() for p in stage.freeze.split(",") if p.strip())
        out.append(Stage(name, start, stop, stage.tasks, freeze, stage.route, changed, stage.get("rows", "")))
        start = stop
    return tuple(out)


def stage_at(all_stages: tuple[Stage, ...], step: int) -> Stage:
    """The stage that makes the update after `step`; the last one at the end of the run."""
    return next((s for s in all_stages if s.start <= step < s.stop), all_stages[-1])
