"""experiments.flexolmo and experiments.kshot_experts.trial from end to end, on the untrained tiny base."""

import json

import pytest

from experiments.flexolmo import __main__ as flexolmo
from experiments.kshot_experts import trial


@pytest.mark.pictures
@pytest.mark.slow
def test_flexolmo_trains_apart_joins_and_leaves_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(flexolmo, "first_base", lambda workdir: "random:tiny")
    flexolmo.main(["--steps=2", "--seeds=1", "--items=2", f"--workdir={tmp_path / 'work'}", f"--out={tmp_path}"])
    (run,) = json.loads((tmp_path / "results.json").read_text())["runs"].values()
    assert len(run) == 12 and all(0 < value < 20 for told in run.values() for value in told.values())
    alone, kept = run["owner of code alone"], run["FlexOlmo without code"]
    assert alone["code"] < run["public base"]["code"] and kept != run["FlexOlmo"]
    assert (tmp_path / "results.png").stat().st_size > 1000 and "FlexOlmo without math" in capsys.readouterr().out


@pytest.mark.slow
def test_the_trial_of_the_bank(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trial, "first_base", lambda workdir: "random:tiny")
    flags = ["--steps=2", "--tune_steps=1", "--seeds=1", "--embed=random:tiny"]
    monkeypatch.setattr(trial, "TEST", 8)
    trial.main([*flags, f"--workdir={tmp_path / 'work'}", f"--out={tmp_path}"])
    (run,) = json.loads((tmp_path / "results.json").read_text())["runs"].values()
    assert len(run["bank"]) == 8 and all(len(set(members)) == 4 for members in run["groups"].values())
    least = run["alike"]["chosen: ppl, least alike"]
    assert least <= run["alike"]["ppl, most alike"] and 0 <= run["in_domain"] <= 1
    assert set(run["test"]) == {"base", "best LoRA", "best LoRA, tuned", *run["groups"]}
    assert "nearest rows" in capsys.readouterr().out
