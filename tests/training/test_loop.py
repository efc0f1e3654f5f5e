"""The training loop on a tiny random model and real packed data: resume, stop, best, warm start, stages, refusals."""

import importlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import launch.train
from molora_jax import config as config_lib
from molora_jax.backbones.compile import compile_model
from molora_jax.errors import InputError
from molora_jax.evaluation.run import load_run
from molora_jax.io.base import load_base
from molora_jax.runs import warm_start
from molora_jax.runs.checkpoints import Checkpoints, read_manifest
from molora_jax.runs.metrics import is_timing
from molora_jax.runs.workdir import Workdir
from molora_jax.training.loop import TrainingRun, train
from tests.data.fakes import numbered

ROOT = pathlib.Path(__file__).parents[2]
FIELDS = {"step", "loss", "lm_loss", "aux/balance", "grad_norm", "lr", "tokens", "seconds"}


def tiny(name="mixlora", *, tasks="math", steps=6, **train_fields):
    """A shipped config on the random model with one cheap task; dropout and packing stay on.

    Runs of as many steps share their compiled step, so a test that may has six.
    """
    config = importlib.import_module(f"configs.{name}").get_config()
    config.base.source = "random:tiny"
    config.data.update(tasks=tasks, seq_len=96)
    config.mesh.update(data=4, fsdp=2)
    config.optim.warmup = 2
    config.train.update(steps=steps, batch_size=8, save_every=0, log_every=100, **train_fields)
    for rule in config.method.rules.values():
        rule.adapter.rank = 2
    config_lib.validate(config)
    return config


def rows(workdir):
    lines = (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not is_timing(k)} for line in lines]


def leaves(workdir, step, items=("adapters", "opt", "router_state", "train")):
    tree = read_manifest(pathlib.Path(workdir) / "checkpoints" / str(step))["tree"]
    return {item: tree[item] for item in items}


def start(config, workdir):
    notes = []
    result = train(config, str(workdir), note=notes.append)
    return result, notes


@pytest.fixture(scope="module")
def whole(tmp_path_factory, drawn):
    workdir = tmp_path_factory.mktemp("whole")
    with drawn():
        result, notes = start(tiny(), workdir)
    return workdir, result, notes


def test_resume_is_bit_exact(whole, tmp_path):
    """6 steps against 3 + resume + 3: adapters, optimizer, state and every metric, by digest and by value."""
    start(tiny(stop_after=3), tmp_path)
    assert [r["step"] for r in rows(tmp_path)] == [1, 2, 3]
    result, notes = start(tiny(), tmp_path)
    assert result.step == 6 and "resumed at step 3" in notes
    assert rows(tmp_path) == rows(whole[0])
    assert leaves(tmp_path, 6) == leaves(whole[0], 6)  # digests included


def test_a_run_is_its_two_halves(tmp_path):
    """With accumulation, router noise, evaluation and several passes over the data."""
    few = numbered(tmp_path / "few.jsonl", 40)

    def config(**fields):
        result = tiny(tasks=few, steps=6, eval_every=3, **fields)
        result.train.accumulate = 2
        result.mesh.update(data=2, fsdp=2, tensor=2)
        result.method.rules.ffn.router.jitter = 0.1
        result.eval.num_items = 4
        return result

    start(config(), tmp_path / "whole")
    start(config(stop_after=3), tmp_path / "broken")
    start(config(), tmp_path / "broken")
    assert rows(tmp_path / "broken") == rows(tmp_path / "whole")
    assert leaves(tmp_path / "broken", 6) == leaves(tmp_path / "whole", 6)
    table = json.loads((tmp_path / "whole" / "data.json").read_text())
    assert table["epoch_steps"] < 3


def test_a_trace_needs_steps_and_never_costs_the_run(tmp_path):
    notes = []
    train(tiny("lora", steps=2), str(tmp_path), profile=True, note=notes.append)
    assert any("--profile needs 3 steps, 2 are left" in note for note in notes) and leaves(tmp_path, 2)


def test_obstacles_in_the_workdir(tmp_path):
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "checkpoints").write_text("a file")
    with pytest.raises(InputError, match="checkpoint 0: .*checkpoints"):
        start(tiny("lora", steps=30), blocked)
    assert len(rows(blocked)) <= 2  # found out within the first compile, not at the end
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(InputError, match=r"metrics\.jsonl: got Is a directory"):
        start(tiny("lora", steps=2), tmp_path)


def test_evaluation_needs_an_item(tmp_path):
    (tmp_path / "one.jsonl").write_text('{"prompt": "a", "target": "b"}\n')
    config = tiny("lora", tasks=f"jsonl:{tmp_path}/one.jsonl", steps=2, eval_every=1)
    with pytest.raises(InputError, match=r"train\.eval_every: got no held-out item"):
        start(config, tmp_path / "run")


def test_metrics_rows_hold_the_contract(whole):
    first = json.loads((whole[0] / "metrics.jsonl").read_text().splitlines()[0])
    assert first["step"] == 1 and FIELDS <= set(first)
    for statistic in ("load_max_over_mean", "entropy", "top1_share", "active_experts"):
        assert len(first[f"site/ffn/ffn/{statistic}"]) == 4
    assert first["site/ffn/ffn/active_experts"] == [2.0] * 4
    assert first["lr"] == pytest.approx(1e-4)
    assert list((whole[0] / "tensorboard").iterdir())
    assert json.loads((whole[0] / "config.json").read_text())["train"]["steps"] == 6


def test_start_prints_rules_and_ends_with_table_and_picture(whole):
    _, result, notes = whole
    assert notes[0].startswith("1 process, 8 devices (cpu), mesh data=4 fsdp=2, base in float32; molora_jax ")
    assert "ffn" in notes[1] and "trainable" in notes[1] and "share" in notes[1]
    assert any(note.startswith("goodput ") and "compile" in note for note in notes)
    assert any("peak memory" in note for note in notes) and (whole[0] / "report" / "loss.png").stat().st_size > 1000
    assert result.step == 6 and np.isfinite(result.loss)


def test_finished_run_starts_and_ends_at_once(whole):
    before = rows(whole[0])
    result, _ = start(tiny(), whole[0])
    assert result.step == 6 and rows(whole[0]) == before


def test_another_identity_is_refused_with_the_difference(whole):
    config = tiny()
    config.optim.learning_rate = 1e-3
    with pytest.raises(InputError, match="optim.learning_rate: was 0.0002, now 0.001"):
        start(config, whole[0])
    config = tiny(remat="full", keep=1)  # runtime fields may change
    start(config, whole[0])


def test_a_damaged_step_is_skipped_by_name(tmp_path):
    config = tiny(keep=3)
    config.train.save_every = 3
    start(config, tmp_path)
    (tmp_path / "checkpoints" / "6" / "manifest.json").write_text("{")
    result, notes = start(config, tmp_path)
    assert any("checkpoint 6 is skipped" in note for note in notes) and "resumed at step 3" in notes
    assert result.step == 6 and [r["step"] for r in rows(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_best_step_is_kept(tmp_path):
    config = tiny(eval_every=1, keep=1)
    config.eval.num_items = 4
    start(config, tmp_path)
    values = [r["valid_nll"] for r in rows(tmp_path)]
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    assert len(values) == 6 and checkpoints.best() == 1 + int(np.argmin(values))


def test_a_warm_start_of_another_scale_is_refused(whole, tmp_path):
    config = tiny(init_from=str(whole[0]), steps=1)
    config.method.rules.ffn.adapter.alpha *= 2
    with pytest.raises(InputError, match="rule ffn has the scale"):
        start(config, tmp_path / "run")


def test_runs_beside_each_other_need_a_folder_of_their_own(whole):
    with pytest.raises(InputError, match="which is a run"):
        launch.train.run([f"--config={ROOT}/configs/mixlora.py", f"--workdir={whole[0]}", "--runs=seed=0,1"])


def test_logits_are_of_tokens_and_a_step_is_said_once(whole):
    run = load_run(whole[0])
    assert run.logits([1, 2]).shape == (2, 320)
    for ids in ([1, 320], [-1], [1.5], ["a"]):
        with pytest.raises(InputError, match="token ids from 0 to 319"):
            run.logits(ids)
    with pytest.raises(InputError, match="step: got 2"):
        load_run(f"{whole[0]}@6", step=2)


def test_warm_start_recuts_segments(whole):
    """Another grouping of the layers starts from the same values, layer by layer."""
    config = tiny()
    config.method.rules.attn.layers = "1-3"

    def started():
        base = load_base("random:tiny")
        model = compile_model(config, base.config)
        shapes = {"adapters": jax.eval_shape(model.init_adapters, jax.random.key(0), base.params)}
        return warm_start.start(str(whole[0]), shapes, base={"digest": base.digest}, rules=model.rules)["adapters"]

    recut(warm_start.load_adapters(str(whole[0])), started())
    config.method.rules.attn.adapter.rank = 4
    with pytest.raises(InputError, match="train.init_from"):
        started()


def recut(old, new):
    """`attn` on layers 1 to 3 alone divides what the rule `ffn` has in one piece."""
    assert set(new["ffn"]) == {"000-000", "001-003"} and set(new["attn"]) == {"001-003"}
    np.testing.assert_array_equal(new["ffn"]["001-003"]["up"]["B"], old["ffn"]["000-003"]["up"]["B"][1:])
    np.testing.assert_array_equal(new["attn"]["001-003"]["q"]["A"], old["attn"]["000-003"]["q"]["A"][1:])
    np.testing.assert_array_equal(
        new["ffn"]["000-000"]["router"]["ffn"]["W"], old["ffn"]["000-003"]["router"]["ffn"]["W"][:1]
    )


@pytest.mark.slow
def test_a_run_starts_from_recut_segments(whole, tmp_path):
    config = tiny(init_from=str(whole[0]), steps=1)
    config.method.rules.attn.layers = "1-3"
    config.optim.learning_rate = 1e-30  # moves nothing
    start(config, tmp_path)
    recut(warm_start.load_adapters(str(whole[0])), warm_start.load_adapters(str(tmp_path)))
    config.method.rules.attn.adapter.rank = 4
    with pytest.raises(InputError, match="train.init_from"):
        start(config, tmp_path / "other")


def biased(**fields):
    """SMoRA on two projections with a load bias that moves visibly."""
    config = tiny("smora", steps=4, **fields)
    config.method.rules["all"].sites = "q,down"
    config.method.rules["all"].router.bias_rate = 1e-3
    config.eval.num_items = 4
    return config


def load_bias(tree):
    return {path: np.asarray(b) for path, b in flatten_dict(jax.device_get(tree), sep="/").items()}


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """Four steps of SMoRA, with an evaluation after every second."""
    workdir = tmp_path_factory.mktemp("biased")
    start(biased(eval_every=2), workdir)
    return workdir


def test_router_state_passes_over_evaluations_stops_and_meshes(evaluated, tmp_path):
    """Against a run that never evaluates, stops in the middle and goes on with its data laid out otherwise."""
    start(biased(stop_after=2), tmp_path)
    start(biased(), tmp_path)
    assert "valid_nll" in rows(evaluated)[1] and "valid_nll" not in rows(tmp_path)[1]
    assert leaves(tmp_path, 4, ("adapters", "opt", "router_state")) == leaves(
        evaluated, 4, ("adapters", "opt", "router_state")
    )
    saved = load_bias(warm_start.load(str(evaluated))["router_state"])
    steps = np.concatenate([b.ravel() for b in saved.values()]) / 1e-3
    assert saved.keys() == {f"all/000-003/router/{site}/b" for site in ("q", "down")}
    assert np.abs(steps).max() > 1 and np.abs(steps).max() <= 4 + 1e-3, "at most bias_rate a step"
    one = load_run(str(evaluated))  # on one device
    config = biased()
    config.mesh.update(data=2, fsdp=4)
    with Workdir(str(evaluated), writer=True) as workdir:
        other = TrainingRun(config, workdir, note=lambda text: None).restore_or_start()
    for tree in (one.router_state, other.router_state):
        restored = load_bias(tree)
        assert restored.keys() == saved.keys()
        assert all((restored[path] == b).all() for path, b in saved.items())


def test_warm_start_takes_the_router_state_along(evaluated, tmp_path):
    config = biased(init_from=str(evaluated), stop_after=1)
    config.method.rules["all"].layers = "1-3"
    config.method.rules["all"].router.bias_rate = 0.0
    start(config, tmp_path)
    old, new = (load_bias(warm_start.load(str(run))["router_state"]) for run in (evaluated, tmp_path))
    for path, b in old.items():
        np.testing.assert_array_equal(new[path.replace("000-003", "001-003")], b[1:])


def test_stages_freeze_and_go_on(tmp_path):
    """Stage s00 trains B alone on one task, s01 everything; a resume inside a stage finds its own optimizer state."""
    config = tiny("lora", tasks="math,sentiment", steps=4, keep=9)
    config.train.save_every = 1
    config.schedule = dict(
        s00=dict(steps=2, tasks="math", freeze="*/A", set=dict(), route=""),
        s01=dict(steps=0, tasks="", freeze="", set=dict(optim=dict(learning_rate=1e-3)), route=""),
    )
    config_lib.validate(config)
    start(config, tmp_path)
    trees = {s: flatten_dict(leaves(tmp_path, s, ("adapters",)), sep="|") for s in (0, 2, 4)}
    A = [k for k in trees[0] if "/A|" in k and k.endswith("digest")] or [k for k in trees[0] if "A|" in k]
    assert A and all(trees[0][k] == trees[2][k] for k in A) and any(trees[2][k] != trees[4][k] for k in A)
    again = tmp_path / "again"
    config.train.stop_after = 3
    start(config, again)
    config.train.stop_after = 0
    start(config, again)
    assert rows(again) == rows(tmp_path) and leaves(again, 4) == leaves(tmp_path, 4)
    assert rows(tmp_path)[3]["lr"] > rows(tmp_path)[1]["lr"]
    second, third = (load_run(f"{tmp_path}@{step}").adapters for step in (2, 3))
    moved = max(np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (second, third)), strict=True))
    assert moved == pytest.approx(rows(tmp_path)[2]["lr"], rel=1e-3), "a fresh Adam moves by the rate of the run's step"


@pytest.mark.parametrize("steps, given_up", [(20, 5), (3, 3)])
def test_a_run_without_finite_gradients_gives_up(tmp_path, steps, given_up):
    config = tiny("lora", steps=steps)
    config.method.rules.all.adapter.alpha = 1e30  # the gradient's norm overflows
    with pytest.raises(InputError, match=f"no finite gradient for {given_up} steps"):
        start(config, tmp_path)


def command(workdir, *more):
    return [
        sys.executable, "-m", "launch.train", "--config=configs/lora.py", f"--workdir={workdir}",
        "--config.base.source=random:tiny", "--config.data.tasks=math", "--config.data.seq_len=96",
        "--config.train.log_every=1", *more,
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_loses_nothing_that_was_saved(tmp_path, number):
    fields = ["--config.train.steps=40", "--config.train.save_every=5"]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    subprocess.run(command(whole, *fields), cwd=ROOT, check=True, env=environment)
    child = subprocess.Popen(command(broken, *fields), cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    for line in child.stderr:
        if line.startswith("step 12/"):
            child.send_signal(number)
            break
    child.stderr.read()
    status = child.wait(timeout=600)
    assert status == (143 if number == signal.SIGTERM else -9)
    saved = Checkpoints(broken / "checkpoints", keep=2).newest_valid()
    assert saved >= (12 if number == signal.SIGTERM else 5)
    time.sleep(0.1)
    subprocess.run(command(broken, *fields), cwd=ROOT, check=True, env=environment)
    assert rows(broken) == rows(whole) and leaves(broken, 40) == leaves(whole, 40)
