"""A folder that a user has from before opens for ever: `v1.tar.gz`, written by the code of commit e556738.

Two runs of six steps: on `random:tiny` and on a Hugging Face folder (`make_v1.py`). `values.json` holds what that code
answered, routed and lost; it also went on to step 8 in a copy.
"""

import json
import pathlib
import tarfile

import numpy as np
import pytest

import molora_jax
from molora_jax.runs import warm_start
from molora_jax.runs.saved import read_config
from molora_jax.runs.verify import verify
from molora_jax.training.loop import train
from tests.golden.make_v1 import PROMPTS, config

RUNS = ("random", "folder")


@pytest.fixture
def golden(tmp_path, monkeypatch):
    with tarfile.open(pathlib.Path(__file__).parent / "v1.tar.gz") as tar:
        tar.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return json.loads((tmp_path / "values.json").read_text())


@pytest.mark.parametrize("name", RUNS)
def test_it_opens_and_says_what_it_said(golden, name):
    run, want = molora_jax.load_run(name), golden[name]
    assert run.step == want["step"]
    assert [run.generate(prompt, max_new_tokens=8) for prompt in PROMPTS] == want["answers"]
    for rule, scopes in run.routing(PROMPTS[0]).items():
        for scope, gates in scopes.items():
            np.testing.assert_allclose(gates, want["gates"][rule][scope], atol=1e-5)


@pytest.mark.parametrize("name", RUNS)
def test_it_goes_on_on_another_mesh(golden, name):
    again = config({"random": "random:tiny", "folder": "dir:base"}[name])
    again.train.stop_after = 0
    again.mesh.data, again.mesh.tensor = 4, 2
    notes = []
    assert train(again, name, note=notes.append).step == 8
    assert "resumed at step 6" in notes
    lacking = [note for note in notes if "older version" in note]
    assert len(lacking) == 1 and all(name in lacking[0] for name in ("base.config", "base.tokenizer"))
    train(again, name, note=notes.append)
    assert sum("older version" in note for note in notes) == 1, "recorded: said once"
    assert verify(name)["ok"] and molora_jax.load_run(name).step == 8
    rows = [json.loads(line) for line in pathlib.Path(name, "metrics.jsonl").read_text().splitlines()]
    for row in rows:  # what it goes on with draws other dropout masks: the same mean, other bits
        same = 1e-5 if row["step"] <= 6 else 3e-3
        assert row["loss"] == pytest.approx(golden[name]["losses"][str(row["step"])], rel=same)


def test_its_config_is_read_and_its_adapters_are_a_start(golden):
    assert read_config("random").train.steps == 8
    assert verify("random")["ok"] and verify("folder")["ok"]
    assert set(warm_start.load_adapters("random")) == {"attn", "ffn"}
