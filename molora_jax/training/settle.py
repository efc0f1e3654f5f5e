"""What of a config is known only once the data are read: the steps of its epochs, and the tasks inside its files."""

import math

from molora_jax import config as config_lib
from molora_jax.config.members import attribute, loss_of, options
from molora_jax.config.resolve import split_commas
from molora_jax.config.values import MOST
from molora_jax.errors import InputError
from molora_jax.regimes import compile_regime


def settle(config, data):
    """`(config, tasks)`: a copy with `train.steps` set by `train.epochs` and its regime, the names behind `task_ids`
    as it uses them.

    Raises:
      InputError: a stage or a loss names a task that is not there, or stages that these steps do not hold.
    """
    config = config.copy_and_resolve_references()
    epochs = config.train.get("epochs", 0.0)
    if epochs:
        steps = math.ceil(round(epochs * data.train.epoch_rows() / config.train.batch_size, 6))
        if steps > MOST:
            raise InputError(
                "train.epochs", got=f"{epochs}, which is {steps:,} steps", expected=f"at most {MOST:,} steps"
            )
        with config.unlocked():
            config.train.update(steps=max(1, steps), epochs=0.0)
        config_lib.validate(config)  # stages of so many steps
        config.train.epochs = epochs
    steps = compile_regime(config).settled(config.train.steps)
    if steps != config.train.steps:
        with config.unlocked():
            config.train.steps = steps
    trained = {name for task in data.tasks[: data.num_trained] for name in (task.name, task.entry)}
    mentioned = set()
    for where, names in _mentioned(config):
        for name in names:
            if name not in trained:
                raise InputError(
                    where, got=repr(name), expected=f"some of {', '.join(sorted(trained))}", fix="Correct the name."
                )
            mentioned.add(name)
    return config, data.labels(mentioned)


def _mentioned(config):
    """`(field, names)` of each field that names tasks."""
    for stage, fields in sorted(config.schedule.items()):
        yield f"schedule.{stage}.tasks", split_commas(fields.tasks)
        losses = fields["set"].get("losses", {})
        yield from _of_losses(f"schedule.{stage}.set.losses", losses, config.losses)
    yield from _of_losses("losses", config.losses, config.losses)
    for name, rule in config.method.rules.items():
        for option in attribute("routers", rule.router.name, "TASKS") or () if "router" in rule else ():
            for group in rule.router.get(option, ()):
                yield f"method.rules.{name}.router.{option}", split_commas(group)


def _of_losses(where, losses, names):
    for name, loss in losses.items():
        member = loss_of(name, names.get(name, {}))
        for option in attribute("losses", member, "TASKS") or () if name in names else ():
            yield f"{where}.{name}.{option}", split_commas(loss.get(option, options("losses", member)[option].default))
