"""A run opened in this process, as plain values that can be compared: what a user would get out of it."""

import contextlib
import io
import logging
import pathlib
import warnings

import jax
from flax.traverse_util import unflatten_dict

import molora_jax
from molora_jax import config as config_lib
from molora_jax.runs.checkpoints import Checkpoints, read_manifest
from molora_jax.runs.obstacles import obstacles
from molora_jax.runs.workdir import Workdir
from molora_jax.training.loop import TrainingRun
from tests.faults.common import arrays_digest

MATTER = ("method", "losses", "optim", "schedule", "seed", "base", "data")  # sections that numbers depend on


def checkpoint(workdir, step: int) -> str:
    """One digest for all items of a step, read through `Checkpoints`."""
    checkpoints = Checkpoints(pathlib.Path(workdir) / "checkpoints", keep=9)
    tree = read_manifest(checkpoints.directory / str(step))["tree"]
    return arrays_digest(checkpoints.restore(step, _templates(tree)))


def newest(workdir):
    """`(step, digest, notes)` of what a start would find."""
    notes = []
    checkpoints = Checkpoints(pathlib.Path(workdir) / "checkpoints", keep=9, warn=notes.append)
    step = checkpoints.newest_valid()
    tree = read_manifest(checkpoints.directory / str(step))["tree"]
    return step, arrays_digest(checkpoints.restore(step, _templates(tree))), notes


def _templates(tree):
    return {
        item: unflatten_dict({k: jax.ShapeDtypeStruct(v["shape"], v["dtype"]) for k, v in leaves.items()}, sep="/")
        for item, leaves in tree.items()
    }


def loaded(workdir, step="best") -> dict:
    """`load_run`: step, weights, model, tokenizer, and the fields of its config that its numbers depend on."""
    run = molora_jax.load_run(str(workdir), step)
    config = config_lib.to_dict(run.config)
    return {
        "step": run.step,
        "adapters": arrays_digest(run.adapters),
        "router_state": arrays_digest(run.router_state),
        "params": arrays_digest(run.params),
        "model": repr(run.model),
        "config": {name: config.get(name) for name in MATTER},
        "prompt": run.prompt_ids("Double 3"),
    }


def resumed(config, workdir) -> tuple[dict, list[str]]:
    """What a start would go on from, and what it said."""
    notes = []
    with obstacles(workdir), Workdir(str(workdir)) as place:  # as `train` does
        run = TrainingRun(config, place, note=notes.append)
        state = run.restore_or_start()
        run.checkpoints.close()
    return {
        "step": int(state.step), "adapters": arrays_digest(state.adapters), "opt": arrays_digest(state.opt),
        "router_state": arrays_digest(state.router_state), "best": run.best, "identity": run.identity,
    }, notes  # fmt: skip


@contextlib.contextmanager
def heard():
    """All that is said meanwhile: log records, warnings, text on the standard streams. `.getvalue()`."""
    said = io.StringIO()
    handler = logging.StreamHandler(said)
    handler.setLevel(logging.WARNING)
    logging.getLogger().addHandler(handler)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            warnings.simplefilter("always")
            yield said
    finally:
        logging.getLogger().removeHandler(handler)
