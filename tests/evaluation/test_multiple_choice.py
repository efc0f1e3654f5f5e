"""Multiple choice by likelihood: the report's numbers are those of the run's own NLL, by hand."""

import json

import numpy as np
import pytest

import molora_jax
from molora_jax.evaluation import report as reports
from molora_jax.evaluation.progress import Phases
from molora_jax.runs.saved import read_config, without_inputs
from tests.surgery.make import lora_rules, new_run


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """A run with random leaves, and twelve questions as its held-out rows."""
    folder = tmp_path_factory.mktemp("choices")
    path, workdir = folder / "quiz.jsonl", new_run(folder / "run", lora_rules())
    rows = [
        dict(prompt=f"Double {i}", choices=[str(2 * i), f"not {i}", "no idea at all"], answer=i % 2, task="quiz")
        for i in range(12)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = without_inputs(read_config(workdir), keep_data=True)
    with config.unlocked():
        config.data.valid = f"jsonl:{path}"
        config.eval.update(num_items=12, num_generated=0)
    return molora_jax.load_run(workdir, config=config, warn=lambda text: None), rows


def test_against_the_nll(asked):
    run, rows = asked
    report = reports.evaluate(run, phases=Phases())
    found = report["tasks"]["quiz"]
    assert found["choices"] == 12 and found["chance"] == pytest.approx(1 / 3)
    right, by_length = 0, 0
    pairs = [(row["prompt"], choice) for row in rows for choice in row["choices"]]
    each = run.nll(*zip(*pairs, strict=True)).reshape(12, 3)
    for row, mean in zip(rows, each, strict=True):
        ids = [len(run.tokenizer.encode(choice)) + 1 for choice in row["choices"]]  # the end token
        nll = mean * ids
        right += int(np.argmin(nll) == row["answer"])
        by_length += int(np.argmin(nll / [len(choice) for choice in row["choices"]]) == row["answer"])
    assert found["choice"][0] == pytest.approx(right / 12) and found["choice_norm"][0] == pytest.approx(by_length / 12)
    assert all("choice" not in task for name, task in report["tasks"].items() if name != "quiz")
    table = reports.text_table(report)
    assert "multiple choice" in table and "33.3%" in table and len([x for x in table.splitlines() if "quiz" in x]) == 2
