"""A tiny untied folder of each family through train, resume, evaluate and generate."""

import functools
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

import molora_jax
from configs import moe_lora
from molora_jax.engines import ENGINES
from molora_jax.evaluation import report as reports
from molora_jax.evaluation.progress import Phases
from molora_jax.training.loop import train
from tests.backbones import family_cases
from tests.backbones.others import written
from tests.tiny import tiny_config, write_task

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parents[2]


def run_of(folder, source, *, steps=6, stop_after=0, routes=False):
    config = tiny_config("mola")
    sites = "q,k,v,o" if routes else config.method.rules.all.sites
    with config.unlocked():
        config.method.rules = dict(all=dict(config.method.rules.all, experts="2", sites=sites))
        config.base.source = source
        config.data.update(tasks=f"jsonl:{folder / 'task.jsonl'}", seq_len=96)
        config.train.update(steps=steps, batch_size=8, save_every=3, log_every=1, stop_after=stop_after)
        config.eval.update(num_items=8, num_generated=4, max_new_tokens=8, batch_size=8)
    return config


UNTIED = {family: family_cases.CASES[f"{family}, untied"] for family in family_cases.FAMILIES}
UNTIED |= {
    name: family_cases.ALL[name] | {"tie_word_embeddings": False}
    for name in ("gemma", "gemma2", "gemma3", "olmo2", "phi3", "phi3, longrope, long", "gpt_oss")
}


@pytest.mark.parametrize("family", UNTIED)
def test_train_resume_evaluate_generate(tmp_path, monkeypatch, family):
    monkeypatch.setenv("MOLORA_CACHE", str(tmp_path / "cache"))
    source = family_cases.write(tmp_path / "base", "folder", UNTIED[family])
    write_task(tmp_path / "task.jsonl")
    quiet, asked = dict(note=lambda text: None), functools.partial(run_of, tmp_path, source, routes=family == "gpt_oss")
    train(asked(), str(tmp_path / "whole"), **quiet)
    train(asked(stop_after=3), str(tmp_path / "broken"), **quiet)
    notes = []
    assert train(asked(), str(tmp_path / "broken"), note=notes.append).step == 6
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


# Arguments: base, workdir, file of rows, engines. Trains, goes on, evaluates, and generates where there is a head.
UNDER_ENGINES = """
import json, sys
import jax, molora_jax
from configs import common, moe_lora
from molora_jax.evaluation import report as reports
from molora_jax.evaluation.progress import Phases

base, workdir, rows, *engines = sys.argv[1:]
told = {}
for engine in engines:
    if base == "random:tiny-moe":
        made = moe_lora.get_config()
    else:
        made = common.get_config()
        router = dict(name="softmax_topk", k=2, share="site")
        adapter = common.adapter(rank=4, dropout=0.0)
        made.method.rules = dict(mix=common.rule("q,v,up,down", experts="8", adapter=adapter, router=router))
        made.losses = dict(balance=common.balance())
    if base == "random:tiny-bert":
        made.objective = dict(name="classify", pooling="mean")
    made.base.source, made.engine = base, engine
    made.data.update(tasks=f"jsonl:{rows}", seq_len=64, test_share=0.2, overlong="truncate")
    made.mesh.update(dict(data=2, expert=4) if jax.device_count() == 8 else {})
    made.train.update(steps=4, batch_size=8, save_every=2, log_every=1)
    made.eval.update(num_items=8, num_generated=2, max_new_tokens=4, batch_size=8)
    for stop in (2, 0):
        made.train.stop_after = stop
        step = molora_jax.train(made, f"{workdir}/{engine}").step
    run = molora_jax.load_run(f"{workdir}/{engine}", "latest")
    report = reports.evaluate(run, phases=Phases())
    generates = base != "random:tiny-bert"
    answers = [run.generate("Double 3", max_new_tokens=4, cache=cache) for cache in (True, False) if generates]
    told[engine] = dict(step=step, nll=[t["nll"][0] for t in report["tasks"].values()], answers=answers)
print(json.dumps(told))
"""


@pytest.mark.parametrize("base", ["tiny", "tiny-untied", "tiny-bert", "tiny-moe"])
def test_every_kind_of_base_under_every_engine_equals_one_device(tmp_path, base):
    labelled = lambda i: {"text": f"number {i}", "label": ("even", "odd")[i % 2]}  # noqa: E731
    answered = lambda i: {"prompt": f"Double {i}", "target": str(2 * i)}  # noqa: E731
    lines = map(labelled if base == "tiny-bert" else answered, range(60))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def run(devices, engines):
        flags = f"--xla_force_host_platform_device_count={devices}"
        done = subprocess.run(
            [sys.executable, "-c", UNDER_ENGINES, f"random:{base}", str(tmp_path / str(devices)),
             str(tmp_path / "rows.jsonl"), *engines],
            cwd=ROOT, env=dict(os.environ, XLA_FLAGS=flags), capture_output=True, text=True, timeout=1800,
        )  # fmt: skip
        assert done.returncode == 0 and done.stderr.count("resumed at step 2") == len(engines), done.stderr
        told = json.loads(done.stdout.splitlines()[-1])
        for engine in engines:
            rows = (tmp_path / str(devices) / engine / "metrics.jsonl").read_text().splitlines()
            told[engine]["loss"] = [json.loads(row)["loss"] for row in rows]
            assert told[engine]["step"] == 4 and len(set(told[engine]["answers"])) <= 1, engine
        return told

    (one,) = run(1, ["replicate"]).values()
    for engine, eight in run(8, list(ENGINES)).items():
        np.testing.assert_allclose(eight["loss"], one["loss"], rtol=2e-5, err_msg=engine)
        np.testing.assert_allclose(eight["nll"], one["nll"], rtol=1e-4, err_msg=engine)


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
