"""The small experiments of the low-rank methods: what is measured of a change, what is told, and (slow) all of them."""

import json
import types

import numpy as np
import pytest

from experiments import small_base
from experiments.factors import __main__ as factors
from experiments.factors import parts
from experiments.routed import small
from molora_jax.evaluation.run import load_run
from tests.surgery.make import lora_rules, new_run


def test_the_change_of_a_run_is_its_product(tmp_path):
    nothing = types.SimpleNamespace(workdir=new_run(tmp_path / "still", lora_rules(rank=2), scale=0.0))
    base = parts.surgery("merge_into_base", nothing, tmp_path / "still-merged") / "base"
    rules = lora_rules(rank=2, alpha=6.0, sites="q,down")
    run = load_run(new_run(tmp_path / "run", rules, source=f"dir:{base}"))
    changes = parts.change(run, types.SimpleNamespace(source=f"dir:{base}"))
    view = run.view()
    for layer in range(run.model.config.layers):
        for site, name in (("q", "self_attn.q_proj"), ("down", "mlp.down_proj")):
            (A, B) = (np.asarray(view["all", layer, site, leaf][0], np.float64) for leaf in "AB")
            product = 3.0 * (B @ A if B.shape[1] == A.shape[0] else B.T @ A)
            np.testing.assert_allclose(changes[f"model.layers.{layer}.{name}.weight"], product, atol=1e-6)
    still = [name for name in changes if "q_proj" not in name and "down_proj" not in name]
    assert still and all(np.abs(changes[name]).max() == 0 for name in still)


def test_directions_by_energy_are_those_of_a_flat_spectrum():
    assert np.exp(parts._entropy(np.ones(7))) == pytest.approx(7)
    assert np.exp(parts._entropy(np.array([1.0, 0, 0]))) == pytest.approx(1)


def test_what_is_told():
    numbers = {"NLL": {"a": 1.0, "b": 2.0}, "norm": {"10": 0.5, "20": 0.6, "30": 0.75}, "rank": 4.0, "trained": 1024}
    assert factors.told(numbers) == "NLL 1.500, norm 0.500 to 0.750, rank 4, trained 1,024"


@pytest.mark.pictures
def test_the_committed_results_are_whole_and_drawn(tmp_path, capsys):
    found = json.loads((factors.HERE / "results.json").read_text())
    assert {key.partition(" |")[0] for key in found["runs"]} == set(parts.PARTS)
    factors.report(found, tmp_path)
    assert (tmp_path / "results.png").stat().st_size > 1000
    said = capsys.readouterr().out
    for part in found["runs"].values():
        assert part and all(row in said for row in part)


@pytest.mark.slow
def test_every_part_runs_and_goes_on(tmp_path, monkeypatch, capsys):
    prose = small.config_of("random:tiny", small.PROSE, 2)
    monkeypatch.setattr(small, "base", lambda workdir: small_base.first_base(workdir, prose))
    command = ["--steps=9", "--seeds=1", f"--workdir={tmp_path / 'work'}", f"--out={tmp_path / 'out'}"]
    assert factors.main(command) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
    pro = found["lora_pro | seed 0"]
    assert pro["full fine-tuning"]["distance"] == 0
    assert pro["LoRA-Pro, R = 64"]["distance"] < pro["LoRA, R = 4"]["distance"]
    ranks = [row["rank"] for row in found["randlora | seed 0"].values()]
    assert ranks[0] == 4 < ranks[1]
    capsys.readouterr()
    monkeypatch.setattr(factors, "Ask", types.SimpleNamespace)  # nothing is trained again
    assert factors.main(command) == 0
