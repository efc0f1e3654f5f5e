"""The learning rate of a row: the one of a small grid with the least validation loss, at a seed that no result has.

All rates of a row train in one step (`training.group`): they differ in nothing else.
"""

import dataclasses
import math
import statistics

from launch import flags
from molora_jax import config as config_lib


def changed(config, changes):
    """A validated copy of a config with dotted fields set."""
    config = flags.override(config.copy_and_resolve_references(), list(changes))
    config_lib.validate(config)
    return config


def grid(entry, protocol, folder) -> dict[str, object]:
    """`{rate: config}` of the runs that choose a row's rate."""
    common = protocol.grid_changes(folder)
    return {
        repr(rate): changed(entry.configs[0], [*common, ("optim.learning_rate", repr(rate))]) for rate in protocol.rates
    }


def best(losses: dict[str, float | None]) -> str:
    """The rate with the least loss; None is a run that came to no finite one."""
    return min(losses, key=lambda rate: math.inf if losses[rate] is None else losses[rate])


def mean(result: dict) -> float | None:
    """The mean over tasks of a run's nats an answer token."""
    value = statistics.fmean(result["nll"].values()) if result.get("nll") else math.nan
    return round(value, 5) if math.isfinite(value) else None


def at_edge(rate: str, losses: dict) -> bool:
    return float(rate) in (min(map(float, losses)), max(map(float, losses)))


def settled(entry, rate: str):
    """The row with its rate in every config."""
    configs = tuple(changed(config, [("optim.learning_rate", rate)]) for config in entry.configs)
    return dataclasses.replace(entry, configs=configs)
