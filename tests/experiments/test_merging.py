"""experiments.merging on a tiny base, with runs of random leaves in the place of trained ones."""

import json

import numpy as np
import pytest

from experiments.merging import __main__ as merging
from experiments.merging import report
from tests.surgery.make import lora_rules, new_run
from tests.tiny import write_task


@pytest.mark.pictures
def test_it_merges_measures_and_writes(tmp_path, monkeypatch):
    def trained(config, workdir, task, seed):
        rules = lora_rules(rank=merging.RANK, sites="q,down")
        return workdir if workdir.exists() else new_run(tmp_path / "runs" / f"run{seed}", rules, seed=seed)

    monkeypatch.setattr(merging, "trained", trained)
    ways = {name: merging.WAYS[name] for name in (report.AGAINST, "LEGO, k = r")}
    monkeypatch.setattr(merging, "WAYS", ways)
    tasks = [f"jsonl:{write_task(tmp_path / name)}" for name in ("a.jsonl", "b.jsonl")]
    command = [
        f"--workdir={tmp_path / 'work'}", f"--out={tmp_path / 'out'}", f"--tasks={','.join(tasks)}", "--items=4",
        "--config.base.source=random:tiny", "--config.data.seq_len=96",
    ]  # fmt: skip
    merging.run(command)
    tree = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(tree["scores"]) == [
        "base model", *(f"LoRA of {task}" for task in tasks), *ways, "halved: LEGO", "halved: first 2 rows"
    ]  # fmt: skip
    text = (tmp_path / "out" / "results.md").read_text()
    assert "| double | even | double-2 | even-2 |" in text and text.count("\n| ") == 1 + len(tree["scores"])
    assert (tmp_path / "out" / "results.png").stat().st_size > 1000
    for score in tree["scores"].values():
        assert 0 < report.mean_nll(score) < 20


def test_the_paired_change_is_of_the_same_items():
    score = {"a": dict(nll=[2.0, 4.0], tokens=[2.0, 2.0], right=[2.0, 1.0])}
    other = {"a": dict(nll=[3.0, 5.0], tokens=[2.0, 2.0], right=[0.0, 0.0])}
    assert report.change(score, other) == pytest.approx([-0.5, -0.5, -0.5])
    assert report.mean_exact(score)[0] == 0.5 and report.mean_nll(score) == np.mean([1.5])
