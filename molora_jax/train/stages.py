"""A run's stages, in the order of their names: each trains some leaves on some tasks for some steps.

The adapter tree is the union over the stages; a stage's optimizer state exists for its own trainable leaves only and
starts fresh with the stage. The learning-rate schedule runs over the whole run.
"""

import dataclasses
from typing import Any

from ml_collections import ConfigDict


@dataclasses.dataclass(frozen=True)
class Stage:
    """Steps `start` to `stop - 1`. `config` is the run's with the stage's `set` applied; `tasks` "" means all."""

    name: str
    start: int
    stop: int
    tasks: str
    freeze: tuple[str, ...]
    config: Any


def stages(config) -> tuple[Stage, ...]:
    """The validated config's stages; `steps=0` takes what the others leave of `train.steps`."""
    named = sorted(config.schedule.items())
    rest = config.train.steps - sum(stage.steps for _, stage in named)
    out, start = [], 0
    for name, stage in named:
        stop = start + (stage.steps or rest)
        changed = ConfigDict(config.to_dict())
        with changed.unlocked():
            changed.update(stage["set"].to_dict())
        freeze = tuple(p.strip() for p in stage.freeze.split(",") if p.strip())
        out.append(Stage(name, start, stop, stage.tasks, freeze, changed))
        start = stop
    return tuple(out)


def stage_at(all_stages: tuple[Stage, ...], step: int) -> Stage:
    """The stage that makes the update after `step`; the last one at the end of the run."""
    return next((s for s in all_stages if s.start <= step < s.stop), all_stages[-1])
