"""launch.evaluate on a tiny run: the report, its pictures, its numbers; bad command lines."""

import contextlib
import dataclasses
import io
import json
import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest

import molora_jax
from launch import evaluate, flags
from molora_jax import pictures
from molora_jax.decode.generate import generate
from molora_jax.evaluation import plots
from molora_jax.objectives.held_out import example_nll
from molora_jax.training.loss_picture import plot_loss

pytestmark = pytest.mark.pictures


@dataclasses.dataclass
class Printed:
    stdout: str
    stderr: str


@pytest.fixture(scope="module")
def evaluated(tiny_run):
    """In this process: a start of jax and compiling anew would be half of the file's time."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(flags.ROOT), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        evaluate.run([f"--workdir={tiny_run}", "--config.eval.num_items=6"])
    return Printed(out.getvalue(), err.getvalue()), json.loads((tiny_run / "report" / "report.json").read_text())


@pytest.mark.slow
def test_the_command_is_that_function(evaluated, tiny_run):
    command = [sys.executable, "-m", "launch.evaluate", f"--workdir={tiny_run}", "--config.eval.num_items=6"]
    done = subprocess.run(command, cwd=flags.ROOT, capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, done.stderr
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [
        line.split()[:2] for line in evaluated[0].stdout.splitlines()
    ]
    assert "tuned: NLL of 12 answers" in done.stderr and "\r" not in done.stderr


def test_report_has_every_field_of_every_task(evaluated, tiny_run):
    _, report = evaluated
    assert report["step"] == 3 and set(report["tasks"]) == {"double", "even"} and report["without_items"] == []
    for task in report["tasks"].values():
        assert task["items"] == 6 and task["generated"] == 4
        for key in ("nll", "nll_base", "nll_change", "exact", "exact_base"):
            value, low, high = task[key]
            assert low <= value <= high, key
        assert 0 < task["nll"][0] < 20 and 0 <= task["exact"][1] and task["exact"][2] <= 1
    share = np.array(list(report["routing"]["ffn"]["ffn"].values()))
    assert share.shape == (2, 4, 8)
    np.testing.assert_allclose(share.sum(-1), 1.0, atol=1e-3)


def test_output_is_a_table_and_paths_of_pictures(evaluated):
    done, report = evaluated
    lines = done.stdout.splitlines()
    assert lines[1].split()[:2] == ["task", "items"]
    assert all(f"{task['nll'][0]:.3f}" in done.stdout for task in report["tasks"].values())
    for name in ("tasks.png", "loss.png", "routing.png", "overview.png", "report.json"):
        (path,) = [line for line in lines if line.endswith(name)]
        assert (flags.ROOT / path).stat().st_size > 1000
    assert "tuned: NLL of 12 answers" in done.stderr and "\r" not in done.stderr


def test_nll_agrees_with_generation(tiny_run):
    """Greedy decoding gives the target exactly where the argmax is right at each of its tokens."""
    run = molora_jax.load_run(tiny_run)
    examples = run.data.heldout("test", 12)
    bound = run.data.train.targets_per_row
    batches = run.data.heldout_batches(examples, 8, targets_per_row=bound)
    sums = example_nll(
        run.model, run.params, run.adapters, {}, batches, len(examples), mesh=run.mesh, targets_per_row=bound,
        constrain=lambda x: x,
    )  # fmt: skip
    assert (sums["tokens"] == [len(e.target_ids) for e in examples]).all()
    # what the model says to itself: all its tokens are right, whatever the targets were
    prompts = [list(e.context_ids) for e in examples]
    ids = generate(
        run.model, run.params, run.adapters, {}, prompts, max_new_tokens=8, eos_id=run.tokenizer.eos_id, batch_size=8
    )
    right = [ids[i][: len(e.target_ids)] == list(e.target_ids) for i, e in enumerate(examples)]
    assert right == (sums["right"] == sums["tokens"]).tolist()


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        ("evaluate", ["--workdir=nowhere"], "workdir: got 'nowhere', which does not exist"),
        ("evaluate", ["--workdir={run}", "--step=999"], "step: got 999"),
        ("evaluate", ["--workdir={run}", "--config.eval.items=3"], "config.eval.items"),
        ("evaluate", [], "--workdir"),
        ("generate", ["--prompt=hi"], "neither --workdir nor --base"),
        ("generate", ["--prompt=hi", "--base", "--workdir={run}"], "both --workdir and --base"),
        ("generate", ["--workdir={run}", "--prompt= "], "--prompt: got ' '"),
        ("generate", ["--workdir={run}", "--prompt=hi", "--step=999"], "step: got 999"),
        ("generate", ["--workdir=nowhere", "--prompt=hi"], "workdir: got 'nowhere'"),
        ("generate", ["--base", "--config.base.source=random:tiny", "--prompt=hi", "--temperature=-1"], "temperature"),
    ],
)
def test_bad_command_lines(module, arguments, message, tiny_run, capsys, monkeypatch):
    """Exit status 2 and one message; in this process, as a start of jax for each would take a minute."""
    import importlib

    monkeypatch.setattr(sys, "argv", ["x", *(text.format(run=tiny_run) for text in arguments)])
    with pytest.raises(SystemExit) as stopped:
        flags.main(importlib.import_module(f"launch.{module}").run)
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and message in err and "Traceback" not in err and out == ""


def test_generate_prints_the_text_alone(tiny_run, capsys):
    from launch.generate import run

    assert run([f"--workdir={tiny_run}", "--prompt=Double 4", "--max_new_tokens=3"]) is None
    printed = capsys.readouterr().out
    assert printed == molora_jax.load_run(tiny_run).generate("Double 4", max_new_tokens=3) + "\n"


def test_loss_picture_survives_what_metrics_hold(tmp_path):
    rows = [dict(step=1, loss="NaN", lm_loss="Infinity"), dict(step=2, loss=1.0, lm_loss=0.5, valid_nll="NaN")]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert plot_loss(tmp_path) == tmp_path / "report" / "loss.png"
    (tmp_path / "metrics.jsonl").write_text("")
    assert plot_loss(tmp_path).stat().st_size > 1000


def test_routing_pictures_of_every_shape(tmp_path):
    rng = np.random.default_rng(0)

    def shares(layers, E):
        return {f"task {i}": rng.dirichlet(np.ones(E), layers).tolist() for i in range(9)}

    sites = {scope: shares(4, 8) for scope in ("q", "k", "v", "o", "gate", "up", "down")}
    for routing in ({}, {"all": {"model": shares(1, 4)}}, {"all": sites}, {"a": {"attn": shares(4, 2)}, "ffn": sites}):
        counts = {"all": (2, 2, 4, 8), "a": (0, 2, 2, 2), "ffn": (8,) * 4}
        assert plots.plot_routing(routing, counts, tmp_path / "routing.png").stat().st_size > 1000


def tasks_named(*names):
    scores = dict(nll=[1.0, 0.5, 1.5], nll_base=[2.0, 1.5, 2.5], exact=[0.5, 0.3, 0.7], exact_base=[0.0, 0.0, 0.2])
    return {"tasks": {name: dict(items=32, generated=16, **scores) for name in names}}


def drawn(monkeypatch, draw, *args):
    """`(figure, image)` of a picture, as it is saved."""
    kept, save = [], plots.save
    monkeypatch.setattr(plots, "save", lambda fig, path: kept.append(fig) or save(fig, path))
    image = matplotlib.image.imread(draw(*args))
    return kept[0], image


@pytest.mark.parametrize("names", [["morph", "translate"], ["a task with a name that leaves no room for axes " * 2]])
def test_no_label_is_cut(monkeypatch, tmp_path, names):
    fig, image = drawn(monkeypatch, plots.plot_tasks, tasks_named(*names), tmp_path / "tasks.png")
    texts = [t for ax in fig.axes for t in [ax.xaxis.label, *ax.get_yticklabels(), *ax.get_xticklabels()]]
    texts = [t.get_window_extent(fig.canvas.get_renderer()) for t in texts if t.get_text() and t.get_visible()]
    needed = max(box.x1 for box in texts) - min(box.x0 for box in texts)
    assert image.shape[1] >= needed * 120 / fig.dpi
    for edge in (image[0], image[-1], image[:, 0], image[:, -1]):
        assert (edge[..., :3] == 1).all(), "a margin all around: nothing reaches the edge"


def test_the_two_signs_of_a_difference_look_unlike():
    low, middle, high = pictures.signed()([0.0, 0.5, 1.0])[:, :3]
    assert low[2] - low[0] > 0.4 and high[0] - high[2] > 0.4 and middle.min() > 0.9, "blue, white, red"


def test_stacked_pictures_keep_their_pixels(tmp_path):
    small, wide = np.zeros((3, 4, 3)), np.full((2, 7, 3), 0.5)
    paths = [tmp_path / "small.png", tmp_path / "wide.png"]
    for path, image in zip(paths, (small, wide), strict=True):
        matplotlib.image.imsave(path, image)
    made = matplotlib.image.imread(plots.stack(paths, tmp_path / "both.png"))
    assert made.shape[:2] == (5, 7) and (made[:3, 1:5, :3] == 0).all() and (made[:3, [0, 5, 6], :3] == 1).all()
    np.testing.assert_allclose(made[3:, :, :3], 0.5, atol=0.01)
