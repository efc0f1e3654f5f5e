"""What the experiments on words share: labelled rows from the task packages, and held-out accuracy of a saved step."""

import dataclasses
import json
import pathlib

import numpy as np


def write_rows(path, rows) -> str:
    """The entry of `data.tasks` of a file of rows, written once."""
    path = pathlib.Path(path).absolute()
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return f"jsonl:{path}"


def words():
    """`(word, class)` of VADER's lexicon: positive or negative."""
    from molora_jax.data.sources import sentiment

    for example in sentiment.examples(sentiment.files()):
        yield example.prompt.split('"')[1], example.target


def write_words(path) -> str:
    return write_rows(path, [dict(text=word, label=label) for word, label in words()])


def held_out_accuracy(workdir, step: int) -> float:
    """The share of the test split (all of it) that the run at a step classifies rightly."""
    from molora_jax import sharding
    from molora_jax.evaluation.run import load_run
    from molora_jax.objectives.held_out import example_nll

    run = load_run(workdir, step)
    model = dataclasses.replace(run.model, max_segments=run.data.train.max_segments)
    examples = run.data.heldout("test", 100_000)
    batches = run.data.heldout_batches(examples, 64, targets_per_row=run.data.train.targets_per_row)
    sums = example_nll(
        model, run.base_params, run.adapters, run.router_state, batches, len(examples), mesh=run.mesh,
        targets_per_row=run.data.train.targets_per_row, constrain=sharding.constrain(run.mesh),
        objective=run.objective, modules=run.modules, head=run.config.objective.name,
    )  # fmt: skip
    return float(np.mean(sums["right"]))
