"""launch.sweep: settings and seeds, what shares a step, what is done, failures, the table; and a real one, killed."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import types

import pytest

from launch import flags, sweep
from molora_jax import config as config_lib
from molora_jax.comparing import sweep as sweeps
from molora_jax.errors import InputError
from molora_jax.regimes.stages import stages
from molora_jax.runs import manifest
from molora_jax.runs.verify import verify
from tests.comparing.folders import config, write_run
from tests.tiny import write_task

GRID = "optim.learning_rate=1e-4,2e-4"


@pytest.fixture
def trained(monkeypatch):
    """Training made by hand: calls are counted, `fails` raise, and a run's NLL is its rate and seed."""
    calls, fails = [], {}

    def one(made, folder, name):
        if name in fails:
            raise fails[name]
        write_run(folder / name, made, nll=1e3 * made.optim.learning_rate + 0.01 * made.seed)

    def train(made, folder, note=None):
        folder = pathlib.Path(folder)
        calls.append([folder.name])
        one(made, folder.parent, folder.name)
        return types.SimpleNamespace(signal=None)

    def together(configs, folder, note=None):
        calls.append(list(configs))
        for name, made in configs.items():
            one(made, folder, name)
        return {name: types.SimpleNamespace(signal=None) for name in configs}

    monkeypatch.setattr("molora_jax.training.loop.train", train)
    monkeypatch.setattr("molora_jax.training.group.train_together", together)
    monkeypatch.setattr("molora_jax.training.setup.setup", lambda made, beside=None: None)
    return types.SimpleNamespace(calls=calls, fails=fails)


def made(tmp_path, grid=GRID, seeds=2, base=None, together=8):
    notes = []
    settings, members = sweep.members_of(base or config(), grid, seeds, note=notes.append)
    return sweeps.Sweep(members, settings, tmp_path / "out", together=together, note=notes.append), notes


def test_one_step_for_equal_shapes_and_nothing_twice(trained, tmp_path):
    one, notes = made(tmp_path, GRID + ";method.rules.ffn.adapter.rank=2,4", seeds=2)
    assert one.perform() is None and len(one.members) == 8
    assert [len(call) for call in trained.calls] == [4, 4]
    assert all("rank=2" in name for name in trained.calls[0]) and "method.rules.ffn.adapter.rank" in " ".join(notes)
    again, _ = made(tmp_path, GRID + ";method.rules.ffn.adapter.rank=2,4", seeds=2)
    again.check()
    assert again.perform() is None and len(trained.calls) == 2, "what is done is not trained again"
    more, _ = made(tmp_path, GRID + ";method.rules.ffn.adapter.rank=2,4", seeds=3)
    more.perform()
    assert [name.endswith("seed=2") for name in trained.calls[2]] == [True, True]
    found = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert found["best"]["name"].startswith("learning_rate=0.0001") and len(found["settings"][0]["runs"]) == 3
    assert json.loads((tmp_path / "out" / "runs.json").read_text())["runs"] == [m.name for m in more.members]


@pytest.mark.pictures
def test_the_table_the_picture_and_how_sure(trained, tmp_path):
    one, _ = made(tmp_path, seeds=3)
    one.perform()
    found, pictures = one.finish()
    text = sweeps.text_table(found)
    assert "*  learning_rate=0.0001  3 of 3" in text and "0.1100" in text and "100" not in text.splitlines()[0]
    assert "best is learning_rate=0.0001, -0.1000" in text and "99.9% sure" in text
    assert {p.name for p in pictures} == {"sweep.png", "losses.png"}
    assert all(path.with_suffix(".pdf").stat().st_size > 1000 for path in pictures)
    assert "needs two seeds" in sweeps.text_table({**found, "best": {**found["best"], "sure": None}})
    assert "not told apart" in sweeps.sentence({"best": {**found["best"], "sure": 0.6}})


def test_one_after_the_other_and_why(trained, tmp_path):
    one, notes = made(tmp_path, base=config(patience=2))
    one.perform()
    assert [len(call) for call in trained.calls] == [1] * 4
    assert any("one after the other, 4 runs of equal shapes: train.patience=2" in note for note in notes)
    other, notes = made(tmp_path / "b", together=1)
    other.perform()
    assert any("--together=1" in note for note in notes)
    small, _ = made(tmp_path / "c", together=3)
    small.perform()
    assert [len(call) for call in trained.calls[-2:]] == [3, 1]


def test_a_failed_run_does_not_lose_the_others(trained, tmp_path, monkeypatch, capsys):
    name = "learning_rate=0.0002_seed=0"
    trained.fails[name] = RuntimeError("RESOURCE_EXHAUSTED: no memory")
    argv = [f"--config={flags.ROOT}/configs/mixlora.py", f"--out={tmp_path / 'out'}", "--seeds=2", f"--grid={GRID}",
            "--config.base.source=random:tiny"]  # fmt: skip
    monkeypatch.setattr("molora_jax.runtime.configure", lambda **_: None)
    assert sweep.run(argv) == 1
    out, err = capsys.readouterr()
    assert "RESOURCE_EXHAUSTED" in err and f"failed: {name}" in err and "1 of 2" in out and "2 of 2" in out
    assert "one after the other" in err, "what a group could not do is tried alone"
    del trained.fails[name]
    before = len(trained.calls)
    assert sweep.run(argv) == 0 and trained.calls[before:] == [[name]], "the next start tries the failed one alone"


@pytest.mark.parametrize("together", [8, 1])
def test_a_signal_before_an_error_ends_the_sweep(trained, tmp_path, together):
    """The error of a run, its folder gone for one, does not hide that the sweep was asked to stop."""
    one, notes = made(tmp_path, together=together)
    error = trained.fails[one.members[0].name] = RuntimeError("its folder is gone")
    error.asked_to_stop = signal.SIGTERM
    assert one.perform() == signal.SIGTERM and len(trained.calls) == 1
    assert any("its folder is gone" in note for note in notes)


def test_a_run_without_finite_gradients_has_failed(tmp_path):
    one, _ = made(tmp_path, seeds=1)
    first, second = one.members
    write_run(tmp_path / "out" / first.name, first.config, skipped=40)
    write_run(tmp_path / "out" / second.name, second.config, step=20)
    assert one.stand(first).state == sweeps.FAILED and "40 steps in a row" in one.stand(first).error
    assert one.stand(second).state == sweeps.BEGUN
    assert [[m.name for m in unit] for unit in one.units()] == [[second.name]]
    over = dict(waited=2, lowest=1.0, rounds=2, stopped=True)
    patient, _ = made(tmp_path / "p", seeds=1, base=config(patience=2))
    write_run(tmp_path / "p" / "out" / patient.members[0].name, patient.members[0].config, step=20, patience=over)
    assert patient.stand(patient.members[0]).state == sweeps.DONE


def test_broken_settings_are_named_before_anything_is_compiled(tmp_path):
    for grid, message in (
        ("optim.learning_rate=1e-4,x", "--grid, learning_rate=x: .*optim.learning_rate: got 'x'"),
        ("optim.learning_rat=1e-4", "Did you mean 'learning_rate'"),
        ("method.rules.ffn.adapter.rank=4,0", "--grid, rank=0: method.rules.ffn.adapter.rank: got 0"),
        ("method.rules.ffn.router.name=top_p,topp", "--grid, name=topp"),
        ("seed=0,1", "--grid, seed: got a field of --seeds"),
        ("seed", "FIELD=VALUE"),
        ("optim.warmup=1,2;optim.warmup=3", "--grid: got optim.warmup twice"),
    ):
        with pytest.raises(InputError, match=message):
            made(tmp_path, grid)
    for flag in ("--seeds=0", "--together=0"):
        with pytest.raises(InputError, match=flag[:6]):
            sweep.run(["--config=mixlora", f"--out={tmp_path}", flag])
    with pytest.raises(InputError, match="train.eval_every: got 0"):
        made(tmp_path, base=config(eval_every=0, epochs=1.0))


def test_a_router_of_another_name_leaves_the_options_of_the_old_one(tmp_path):
    one, notes = made(tmp_path, "method.rules.ffn.router.name=softmax_topk,top_p", seeds=2)
    routers = [dict(member.config.method.rules.ffn.router) for member in one.members[::2]]
    assert routers[0]["k"] == 2 and routers[1] == {"name": "top_p", "share": "ffn"}
    assert notes == ["method.rules.ffn.router.name=top_p: without k of the config, which top_p does not know"]


def test_a_run_without_evaluations_has_one_at_its_end(tmp_path):
    one, _ = made(tmp_path, "", base=config(eval_every=0))
    assert [m.name for m in one.members] == ["seed=0", "seed=1"] and one.members[0].config.train.eval_every == 40
    late, notes = made(tmp_path, "", base=config(eval_every=50))
    assert late.members[0].config.train.eval_every == 40 and "eval_every=50 is beyond the last step" in notes[0]


def test_stages_that_change_the_config_are_the_same_sweep(tmp_path):
    """A step holds the config of its stage."""
    base = config()
    with base.unlocked():
        one = base.schedule.s00.to_dict()
        change = dict(method=dict(rules=dict(ffn=dict(experts="4"))))
        base.schedule = dict(s00=one | dict(steps=20), s01=one | dict(steps=20, set=change))
    sweep_of, _ = made(tmp_path, seeds=1, base=base)
    for member in sweep_of.members:
        run = write_run(tmp_path / "out" / member.name, member.config)
        path = run / "checkpoints" / "40"
        content = manifest.read_manifest(path) | {"stage": "s01"}
        content["config"] = config_lib.to_dict(stages(member.config)[1].config)
        assert content["config"]["method"]["rules"]["ffn"]["experts"] == "4"
        (path / "manifest.json").unlink()
        meta = {name: content[name] for name in ("samples", "config", "parameters", "stage")}
        manifest.write(path, manifest.build(40, meta=meta, tree={}, files={}))
    sweep_of.check()
    other, _ = made(tmp_path, seeds=1)
    with pytest.raises(InputError, match="got another run"):
        other.check()


def test_another_sweep_in_the_folder_is_refused(trained, tmp_path):
    one, _ = made(tmp_path)
    one.perform()
    other, _ = made(tmp_path, base=config(batch_size=4))
    with pytest.raises(InputError, match="train.batch_size: was 8, now 4"):
        other.check()
    write_run(tmp_path / "run", config())
    with pytest.raises(InputError, match="--out: got .*the folder of a run"):
        sweeps.Sweep(one.members, one.settings, tmp_path / "run", together=8, note=print).check()


@pytest.mark.slow
def test_a_sweep_that_is_killed_goes_on(tmp_path):
    """kill -9 in the second of two steps: what was done is not touched, the half ones go on, all are ordinary runs."""
    task, out = write_task(tmp_path / "task.jsonl"), tmp_path / "out"
    command = [sys.executable, "-m", "launch.sweep", "--config=configs/lora.py", f"--out={out}", "--seeds=2",
               f"--grid={GRID};method.rules.all.adapter.rank=2,4", "--config.base.source=random:tiny",
               f"--config.data.tasks=jsonl:{task}", "--config.data.seq_len=96", "--config.train.steps=12",
               "--config.train.save_every=2", "--config.eval.num_items=4"]  # fmt: skip
    process = subprocess.Popen(command, cwd=flags.ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    last = out / "learning_rate=0.0002_rank=4_seed=1" / "checkpoints" / "2"
    while not last.exists():
        assert process.poll() is None
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = out / "learning_rate=0.0001_rank=2_seed=0" / "metrics.jsonl"
    before = done.stat().st_mtime_ns
    again = subprocess.run(command, cwd=flags.ROOT, capture_output=True, text=True, timeout=3000)
    assert again.returncode == 0, again.stderr
    assert done.stat().st_mtime_ns == before and "4 to train" in again.stderr and "resumed at step" in again.stderr
    found = json.loads((out / "sweep.json").read_text())
    runs = [run for setting in found["settings"] for run in setting["runs"]]
    assert [run["state"] for run in runs] == ["done"] * 8 and all(run["step"] == 12 for run in runs)
    assert all(verify(out / run["workdir"], deep=True)["ok"] for run in runs)
