"""`train.patience`: where a run ends, what it keeps and says, that it goes on to the same end, that it stays ended."""

import json

import pytest

from molora_jax import config as config_lib
from molora_jax.errors import InputError
from molora_jax.runs.checkpoints import read_manifest
from molora_jax.training.group import train_together
from molora_jax.training.patience import Patience
from molora_jax.training.run import TrainingRun
from tests.training.test_stages import config, stage, start, write

VALID = {1: 3.0, 2: 2.0, 3: 2.5, 4: 1.5, 5: 1.7, 6: float("nan"), 7: 1.6, 8: 0.1}  # by step


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data") / "d.jsonl", "text")


@pytest.fixture
def scripted(monkeypatch):
    """The held-out NLL of a step is the table's."""
    monkeypatch.setattr(TrainingRun, "valid_nll", lambda run, program, state: VALID[int(state.step)])


def patient(data, **fields):
    return config(data, **dict(steps=8, eval_every=1, save_every=1, patience=3, keep=9) | fields)


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_it_ends_keeps_its_best_and_stays_ended(data, tmp_path, scripted):
    start(patient(data, stop_after=5), tmp_path)  # as a kill between two rounds: the count is in the step
    result, notes = start(patient(data), tmp_path)
    assert (result.step, result.stopped, result.signal) == (7, "patience", None)
    assert any("ended at step 7 of 8 by train.patience=3: 3 evaluations in a row" in note for note in notes)
    assert [row["patience"] for row in rows(tmp_path)] == [0, 0, 1, 0, 1, 2, 3]
    assert rows(tmp_path)[-1]["stopped"] == "patience" and all("stopped" not in row for row in rows(tmp_path)[:-1])
    told = read_manifest(tmp_path / "checkpoints" / "7")["patience"]
    assert told == dict(rounds=3, waited=3, lowest=1.5, stopped=True)
    assert json.loads((tmp_path / "checkpoints" / "best.json").read_text()) == {"step": 4}
    again, notes = start(patient(data), tmp_path)
    assert again.step == 7 and len(rows(tmp_path)) == 7 and any("nothing to do: ended at step 7" in n for n in notes)
    more, _ = start(patient(data, patience=4), tmp_path)
    assert more.step == 8 and more.stopped == "", "raised, it goes on, and the last round was a better one"


def test_of_several_stages_the_last_alone_may_end(data, tmp_path, scripted):
    stages = dict(s00=stage(steps=4), s01=stage())
    made = patient(data, patience=1, schedule=stages)
    result, _ = start(made, tmp_path)
    assert result.step == 6, "step 5 is the first round of the last stage"
    assert "patience" not in rows(tmp_path)[2]


def test_counting():
    patience = Patience(2)
    assert (
        not patience.seen(float("nan"))
        and patience.seen(float("inf"))
        and patience.record()["patience"]["lowest"] is None
    )
    assert Patience(0).record() == {} and not Patience(0, dict(waited=9, lowest=1.0)).over


def test_refusals(data, tmp_path):
    for fields, message in (
        (dict(eval_every=0), "train.patience: got 3; expected 0 where train.eval_every=0"),
        (dict(patience=-1), "train.patience: got -1"),
    ):
        with pytest.raises(InputError, match=message):
            patient(data, **fields)
    made = patient(data)
    with made.unlocked():
        made.regime = dict(name="continual")
    with pytest.raises(InputError, match="train.patience: got 3; expected 0 with regime 'continual'"):
        config_lib.validate(made)
    with pytest.raises(InputError, match="train.patience=3; expected 0: all runs take their steps together"):
        train_together({"a": patient(data)}, tmp_path)
    assert not list(tmp_path.iterdir())
