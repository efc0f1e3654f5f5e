"""A tiny untied folder of each family through train, resume, evaluate and generate."""

import json

import numpy as np
import pytest

import molora_jax
from configs import moe_lora
from molora_jax.engines import ENGINES
from molora_jax.evaluation import report as reports
from molora_jax.evaluation.progress import Phases
from molora_jax.training.loop import train
from tests.backbones import family_cases
from tests.backbones.test_others import written
from tests.tiny import tiny_config, write_task

pytestmark = pytest.mark.slow


def run_of(folder, source, *, steps=6, stop_after=0):
    config = tiny_config("mola")
    with config.unlocked():
        config.method.rules = dict(all=dict(config.method.rules.all, experts="2"))
        config.base.source = source
        config.data.update(tasks=f"jsonl:{folder / 'task.jsonl'}", seq_len=96)
        config.train.update(steps=steps, batch_size=8, save_every=3, log_every=1, stop_after=stop_after)
        config.eval.update(num_items=8, num_generated=4, max_new_tokens=8, batch_size=8)
    return config


@pytest.mark.parametrize("family", family_cases.FAMILIES)
def test_train_resume_evaluate_generate(tmp_path, monkeypatch, family):
    monkeypatch.setenv("MOLORA_CACHE", str(tmp_path / "cache"))
    source = family_cases.write(tmp_path / "base", "folder", family_cases.CASES[f"{family}, untied"])
    write_task(tmp_path / "task.jsonl")
    quiet = dict(note=lambda text: None)
    train(run_of(tmp_path, source), str(tmp_path / "whole"), **quiet)
    train(run_of(tmp_path, source, stop_after=3), str(tmp_path / "broken"), **quiet)
    notes = []
    assert train(run_of(tmp_path, source), str(tmp_path / "broken"), note=notes.append).step == 6
    assert "resumed at step 3" in notes
    whole, broken = (
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "broken")
    )
    assert whole == broken and len(whole) == 6 and np.isfinite(whole).all()
    run = molora_jax.load_run(tmp_path / "broken")
    assert not run.model.config.tied and run.params["head"].shape == (family_cases.D, family_cases.V)
    report = reports.evaluate(run, phases=Phases())
    tasks = report["tasks"]
    assert all(np.isfinite([task["nll"][0], task["nll_base"][0]]).all() for task in tasks.values())
    answer = run.generate("Double 3", max_new_tokens=8)
    assert answer == run.generate("Double 3", max_new_tokens=8, cache=False)
    print(f"{family}: loss {whole[0]:.3f} -> {whole[-1]:.3f}, resumed at 3 bit for bit;", end=" ")
    print({name: (round(t["nll_base"][0], 3), round(t["nll"][0], 3)) for name, t in tasks.items()}, repr(answer))


@pytest.mark.parametrize(
    ("engine", "mesh"),
    [("replicate", dict(data=8)), *((e, dict(data=2, expert=4)) for e in ENGINES if e != "ragged_all_to_all")], ids=str,
)  # fmt: skip
def test_a_base_that_routes(tmp_path, monkeypatch, mesh, engine):
    """OLMoE with a mixture on attention, a LoRA a base expert and a router that trains; resumed bit for bit."""
    monkeypatch.setenv("MOLORA_CACHE", str(tmp_path / "cache"))
    source = written(tmp_path / "base", "olmoe")
    write_task(tmp_path / "task.jsonl")

    def config(**train):
        made = moe_lora.get_config()
        with made.unlocked():
            made.method.rules.moe.base_router = "trained"
            made.base.source, made.engine = source, engine
            made.data.update(tasks=f"jsonl:{tmp_path / 'task.jsonl'}", seq_len=64, overlong="truncate")
            made.mesh.update(mesh)
            made.train.update(dict(steps=4, batch_size=8, save_every=2, log_every=1) | train)
            made.eval.update(num_items=4, num_generated=2, max_new_tokens=4, batch_size=8)
        return made

    quiet = dict(note=lambda text: None)
    train(config(), str(tmp_path / "whole"), **quiet)
    train(config(stop_after=2), str(tmp_path / "broken"), **quiet)
    train(config(), str(tmp_path / "broken"), **quiet)
    whole, broken = (
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "broken")
    )
    assert whole == broken and len(whole) == 4 and np.isfinite(whole).all()
    run = molora_jax.load_run(tmp_path / "broken")
    fresh = np.swapaxes(np.asarray(run.params["blocks"]["router"]["kernel"]), 1, 2)
    assert np.abs(run.adapters["moe"]["000-001"]["router"]["base"]["W"] - fresh).max() > 0
    report = reports.evaluate(run, phases=Phases())
    assert all(np.isfinite([task["nll"][0], task["nll_base"][0]]).all() for task in report["tasks"].values())
    answer = run.generate("Double 3", max_new_tokens=4)
    assert answer == run.generate("Double 3", max_new_tokens=4, cache=False)
