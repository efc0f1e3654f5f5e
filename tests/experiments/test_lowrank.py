"""The low-rank experiment: which methods, at which rates, and that it goes on from its file. Runs are faked."""

import json

import pytest

from experiments.lowrank import __main__ as lowrank
from molora_jax.backbones.families import TINY
from molora_jax.errors import InputError
from tests.experiments.test_leaderboard import BASE, Fake


def start(tmp_path, *argv):
    return lowrank.main([f"--out={tmp_path}/out", f"--workdir={tmp_path}/work", BASE, "--steps=2", *argv])


@pytest.mark.pictures
def test_it_goes_on_from_its_file(tmp_path, monkeypatch):
    fake = Fake(monkeypatch)
    usual = ("--methods=lora,ia3", "--items=2")
    assert start(tmp_path, *usual, "--seeds=1") == 0
    assert [name.split("-")[0] for name in fake.take()] == ["base", "lora", "ia3", "cost", "cost"]
    assert start(tmp_path, *usual, "--seeds=2") == 0
    assert [name.split("-")[0] for name in fake.take()] == ["lora", "ia3"]
    text = (tmp_path / "out" / "results.md").read_text()
    assert text.startswith("# Low-rank methods") and "python -m experiments.lowrank --steps=2 --items=2" in text
    assert "(IA)3 does not meet the rule of this table" in text
    assert (tmp_path / "out" / "results.png").stat().st_size > 1000
    assert len(json.loads((tmp_path / "out" / "results.json").read_text())["runs"]) == 4


def test_methods_without_a_router_at_their_own_rates():
    names = lowrank.chosen("all")
    assert {"lora", "pissa", "lora_plus", "mos", "vera", "nola"} <= set(names)
    assert not {"mixlora", "coe", "x_lora", "smora"} & set(names)
    with pytest.raises(InputError, match="without a router"):
        lowrank.chosen("lora,mola")
    rates = [lowrank.entry(name, TINY, [], 1).configs[0].optim.learning_rate for name in ("lora", "randlora")]
    assert rates == pytest.approx([1e-3, 5e-4])
