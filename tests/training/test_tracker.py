"""`train.tracker="wandb"`: what a run sends, that one id serves all starts, that nothing it does costs the run."""

import json
import os
import sys
import threading
import types

import pytest

from molora_jax.training import tracker as trackers
from molora_jax.training.loop import train
from tests.training.test_stages import config, write


class Fake(types.ModuleType):
    """wandb, as far as it is used; `fails`: the call that raises."""

    def __init__(self, fails="", hangs=None):
        super().__init__("wandb")
        self.fails, self.hangs, self.calls, self.rows, self.ended = fails, hangs, [], [], 0
        self.Settings = lambda **fields: fields

    def _called(self, name):
        if self.hangs is not None:
            self.hangs.wait()
        if self.fails == name:
            raise SystemExit("not logged in\nmore") if name == "init" else OSError("no room")

    def init(self, **fields):
        self._called("init")
        self.calls.append(fields)
        return types.SimpleNamespace(define_metric=lambda *a, **k: None, log=self.log, finish=self.finish)

    def log(self, row):
        self._called("log")
        self.rows.append(row)

    def finish(self):
        self.ended += 1


@pytest.fixture
def wandb(monkeypatch):
    def put(**options):
        fake = Fake(**options)
        monkeypatch.setitem(sys.modules, "wandb", fake)
        return fake

    return put


def follow(folder, notes, steps=3):
    made = types.SimpleNamespace(train={"tracker": "wandb"})
    track = trackers.tracker(made, folder, as_dict={"seed": 0}, note=notes.append)
    for step in range(1, steps + 1):
        track.log({"step": step, "loss": 1.0 / step, "site/a": [1.0, 3.0], "stopped": "patience"})
    track.close()


def test_numbers_go_there_and_every_start_is_one_run(wandb, tmp_path):
    fake, notes = wandb(), []
    follow(tmp_path, notes)
    follow(tmp_path, notes)
    assert fake.rows[:2] == [{"step": 1, "loss": 1.0, "site/a": 2.0}, {"step": 2, "loss": 0.5, "site/a": 2.0}]
    first, second = fake.calls
    assert first["id"] == second["id"] == json.loads((tmp_path / "tracker.json").read_text())["wandb"]
    assert first["config"] == {"seed": 0} and first["name"] == tmp_path.name and fake.ended == 2 and notes == []


@pytest.mark.parametrize("call", ["init", "log"])
def test_a_failure_is_told_once(wandb, tmp_path, call):
    wandb(fails=call)
    notes = []
    follow(tmp_path, notes, steps=50)
    assert len(notes) == 1 and "the run goes on without it" in notes[0] and "more" not in notes[0]


def test_a_tracker_that_hangs_does_not_hold_the_run(wandb, tmp_path, monkeypatch):
    release, notes = threading.Event(), []
    wandb(hangs=release)
    monkeypatch.setattr(trackers, "SECONDS", 0.2)
    monkeypatch.setattr(trackers, "WAITING", 2)
    follow(tmp_path, notes, steps=50)
    release.set()
    assert len(notes) == 1 and "has not answered" in notes[0]


def test_a_run_is_tracked_and_one_without_wandb_ends_as_it_would(wandb, tmp_path, monkeypatch):
    data, fake, notes = write(tmp_path / "d.jsonl", "text"), wandb(), []
    train(config(data, steps=2, tracker="wandb"), str(tmp_path / "run"), note=notes.append)
    assert [row["step"] for row in fake.rows] == [1, 2] and {"loss", "lr", "grad_norm"} <= fake.rows[0].keys()
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import of it fails
    result = train(config(data, steps=3, tracker="wandb"), str(tmp_path / "run"), note=notes.append)
    assert result.step == 3 and any("pip install 'molora_jax[track]'" in note for note in notes)


@pytest.mark.slow
def test_the_real_one_offline(tmp_path, monkeypatch):
    """Two starts of one run below its folder; the file of wandb holds the numbers of metrics.jsonl."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setitem(os.environ, "WANDB_SILENT", "true")
    data, notes = write(tmp_path / "d.jsonl", "text"), []
    for steps in (2, 4):
        train(config(data, steps=steps, tracker="wandb"), str(tmp_path / "run"), note=notes.append)
    files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2 and not [note for note in notes if "wandb" in note]
    ident = json.loads((tmp_path / "run" / "tracker.json").read_text())["wandb"]
    assert all(ident in file.name for file in files)
    held = b"".join(file.read_bytes() for file in files)
    assert b"grad_norm" in held and b"learning_rate" in held
