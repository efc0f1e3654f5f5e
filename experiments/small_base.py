"""A base that knows something: a decoder of four layers (width 64, bytes), trained whole and written as a model."""

import pathlib

from configs import common
from molora_jax import config as schema


def config_of(source, tasks, steps, seed=0, rate=4e-3, *, seq_len=128):
    """A run on a small base: a constant rate, rows of `seq_len` bytes, nothing generated."""
    made = common.get_config()
    made.seed, made.base.source = seed, source
    made.data.update(tasks=tasks, seq_len=seq_len)
    made.optim.update(learning_rate=rate, warmup=10, decay="constant")
    made.train.update(steps=steps, batch_size=8, save_every=0, log_every=100)
    made.eval.update(num_items=64, num_generated=0)
    return made


def first_base(workdir, made, name="prose") -> str:
    """The source of the base that `made`, a config on `random:tiny`, trains whole; in workdir/name, kept there."""
    from molora_jax.surgery.perform import perform
    from molora_jax.training.loop import train

    workdir = pathlib.Path(workdir)
    out, whole = workdir / name, str(workdir / "whole")
    if not (out / "base" / "config.json").is_file():
        made.method.train_base = "all"
        schema.validate(made)
        train(made, whole)
        merged = common.surgery("merge_into_base")
        merged.surgery.inputs = (whole,)
        perform(merged, str(out))
    return f"dir:{out / 'base'}"


def count_of(notes) -> int:
    """How many numbers a run trains, as the table among its notes says."""
    total = next(line for text in notes for line in text.splitlines() if line.startswith("total"))
    return int(total.split()[1].replace(",", ""))
