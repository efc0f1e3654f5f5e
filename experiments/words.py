"""What the experiments on words share: labelled rows from the task packages, and held-out accuracy of a saved step."""

import json
import pathlib

import numpy as np


def kept(path, **setting) -> dict:
    """`{"setting": ..., "runs": {...}}` of a results file; no runs where it is of another setting, or not there."""
    found = json.loads(path.read_text()) if path.is_file() else {}
    return found if found.get("setting") == setting else dict(setting=setting, runs={})


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
    """The fraction of the test split (all of it) that the run at a step classifies rightly."""
    from molora_jax.evaluation import choices
    from molora_jax.evaluation.progress import Phases
    from molora_jax.evaluation.run import load_run

    run = load_run(workdir, step)
    sums = choices.score(run, run.data.heldout("test", 100_000), start=False, phases=Phases())
    return float(np.mean(sums["right"]))
