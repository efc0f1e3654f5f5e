"""Tasks in sequence: the matrix and what is made of it, memory in the checkpoint, replay, the parabola of EWC."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from molora_jax.core import trees
from molora_jax.data.example import seed_of, shuffled
from molora_jax.errors import InputError
from molora_jax.evaluation.run import load_run
from molora_jax.losses import LOSSES
from molora_jax.objectives import Forward
from molora_jax.regimes.continual import backward_transfer, forgetting
from molora_jax.runs.verify import verify
from molora_jax.runs.workdir import Workdir
from molora_jax.training import loop
from tests.regimes.small import TASKS, arrays, config, cut, digests, rows, start, write

REGIME = dict(name="continual", replay=5, fisher_rows=6)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data"))


def ewc(data, **fields):
    return config(data, regime=REGIME, losses=dict(ewc=dict(weight=2.0)), optim="adamw", steps=9, **fields)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory, drawn):
    """Three steps of each of three tasks, with EWC and replay."""
    workdir = tmp_path_factory.mktemp("whole")
    with drawn():
        _, notes = start(ewc(data), workdir)
    return workdir, notes


def opened(made, folder):
    with Workdir(folder) as workdir:
        return loop.TrainingRun(made, workdir, note=lambda text: None)


def test_transfer_and_forgetting_are_the_papers():
    """By hand: after three tasks the first lost 20 points from its best, the second gained 10."""
    a = np.array([[0.8, 0.3, 0.2], [0.9, 0.6, 0.2], [0.7, 0.7, 0.9]])
    assert backward_transfer(a) == pytest.approx(((0.7 - 0.8) + (0.7 - 0.6)) / 2)
    assert forgetting(a) == pytest.approx(((0.9 - 0.7) + (0.6 - 0.7)) / 2)
    assert backward_transfer(a[:1, :1]) is None and forgetting(np.full((2, 2), np.nan)) is None


def test_the_matrix_is_measured_after_every_task(whole):
    report = json.loads((whole[0] / "report" / "continual.json").read_text())
    assert report["tasks"] == list(TASKS) and report["metric"].startswith("share of held-out texts")
    a = np.array(report["accuracy"], float)
    assert a.shape == (3, 3) and np.isfinite(a).all() and ((a >= 0) & (a <= 1)).all()
    assert report["backward_transfer"] == pytest.approx(backward_transfer(a))
    assert report["forgetting"] == pytest.approx(forgetting(a))
    lines = {line["step"]: line for line in rows(whole[0])}
    for i, step in enumerate((3, 6, 9)):
        assert [lines[step][f"task_accuracy/{task}"] for task in TASKS] == list(a[i])
    np.testing.assert_array_equal(arrays(whole[0], 9, "memory")["accuracy"], a)
    assert (whole[0] / "report" / "continual.png").stat().st_size > 5000
    assert any("forgetting" in note for note in whole[1])


@pytest.mark.slow
def test_the_last_row_is_what_the_opened_run_measures(whole):
    """The oracle: the run loaded from its folder, classified row by row."""
    run = load_run(whole[0], "latest")
    report = json.loads((whole[0] / "report" / "continual.json").read_text())
    examples = [e for e in run.data.heldout("valid", 8) if e.task == TASKS[2]]
    head, right = run.modules["classify"], []
    for example in examples:
        ids = np.array([example.context_ids], np.int32)
        batch = dict(tokens=ids, segment_ids=np.ones_like(ids), positions=np.arange(ids.shape[1])[None])
        hidden = run.model.hidden(run.params, run.adapters, run.router_state, batch)[0]
        scores = jnp.mean(hidden, axis=1) @ head["kernel"] + head["bias"]
        right.append(run.labels[int(jnp.argmax(scores))] == example.target)
    assert report["accuracy"][2][2] == pytest.approx(np.mean(right)) and verify(whole[0], deep=True)["ok"]


@pytest.mark.parametrize("stop", [4, pytest.param(6, marks=pytest.mark.slow)])
def test_an_end_within_and_between_tasks_changes_no_bit(whole, data, tmp_path, stop):
    folder = cut(whole[0], tmp_path / "run", stop)
    start(ewc(data), folder)
    assert digests(folder, 9) == digests(whole[0], 9), "the memory included"
    assert rows(folder) == rows(whole[0])
    assert (folder / "report" / "continual.json").read_text() == (whole[0] / "report" / "continual.json").read_text()


def test_the_fisher_information_is_the_mean_of_squared_gradients_one_by_one(whole, data, tmp_path):
    """Of the memory after the first task, against a gradient an example; the anchor is where the task ended."""
    memory, at = arrays(whole[0], 3, "memory"), arrays(whole[0], 3)
    run = opened(ewc(data), tmp_path)
    stage = run.stages[0]
    program, stream = run.programs[stage.name], run.data.train.for_tasks(stage.tasks)
    ids = np.concatenate([stream.members(i) for i in stream.task_ids])
    ids = ids[shuffled(seed_of("squares", 0, stream.task_ids), len(ids))][:6]
    leaves = unflatten_dict({**at, **{f"modules/{k}": v for k, v in arrays(whole[0], 3, "modules").items()}}, sep="/")

    @jax.jit
    def gradient(leaves, params, row):
        def loss(leaves):
            adapters, modules = trees.apart(leaves)
            hidden = lambda batch: program.model.hidden(params, adapters, {}, batch)[0]  # noqa: E731
            forward = Forward(program.model, params, hidden, 8)
            return program.objective.loss(forward, modules["classify"], {}, row, 1.0)[0]

        return jax.grad(loss)(leaves)

    squares = {path: 0.0 for path in flatten_dict(leaves, sep="/")}
    for i in ids.tolist():
        tokens = run.data.splits["train"].tokens(i)
        row = {n: np.zeros((8, 16), np.int32) for n in ("tokens", "targets", "segment_ids", "positions", "task_ids")}
        n = len(tokens) - 1
        row["tokens"][0, :n], row["targets"][0, n - 1] = tokens[:n], tokens[n]
        row["segment_ids"][0, :n], row["positions"][0, :n] = 1, np.arange(n)
        row["loss_weight"] = np.zeros((8, 16), np.float32)
        row["loss_weight"][0, n - 1] = 1
        for path, g in flatten_dict(gradient(leaves, run.params, row), sep="/").items():
            squares[path] += np.asarray(g) ** 2 / len(ids)
    for path, wanted in squares.items():
        np.testing.assert_allclose(memory[f"penalties/ewc/fisher/{path}"], wanted, rtol=2e-4, atol=1e-9, err_msg=path)
    for path, leaf in at.items():
        fisher = memory[f"penalties/ewc/fisher/{path}"]
        np.testing.assert_allclose(memory[f"penalties/ewc/anchor/{path}"][fisher > 0], leaf[fisher > 0], rtol=1e-6)


def test_one_parabola_has_the_slope_of_all_tasks():
    loss, rng = LOSSES["ewc"](), np.random.default_rng(0)
    draw = lambda: {"a": rng.random((3, 2)), "b": rng.random(4)}  # noqa: E731
    tasks = [(draw(), draw()) for _ in range(3)]
    memory = loss.fresh(jax.tree.map(jnp.asarray, draw()))
    for fisher, theta in tasks:
        memory = loss.remember(memory, jax.tree.map(jnp.asarray, theta), jax.tree.map(jnp.asarray, fisher))
    x = draw()
    slope = jax.grad(loss.penalty)(jax.tree.map(jnp.asarray, x), memory)
    for name, leaf in x.items():
        wanted = sum(fisher[name] * (leaf - theta[name]) for fisher, theta in tasks)
        np.testing.assert_allclose(slope[name], wanted, rtol=1e-5)


def test_replayed_rows_are_a_few_of_every_earlier_task(data, tmp_path):
    run = opened(ewc(data), tmp_path)
    first, _, last = (run.source(stage) for stage in run.stages)
    assert len(first.task_ids) == 1 and len(last.task_ids) == 3
    sizes = {run.data.task_names[i]: len(last.members(i)) for i in last.task_ids}
    assert sizes["parity"] == sizes["size"] == 5 < sizes["third"]
    drawn = np.concatenate([last.draws(window) for window in range(8)])
    share = np.mean(run.data.splits["train"].task_ids[drawn] != run.data.task_names.index("third"))
    assert share == pytest.approx(0.25, abs=0.02)


def test_steps_that_leave_tasks_without_any_are_said(data, tmp_path):
    run = opened(config(data, regime=dict(name="continual"), steps=2), tmp_path)
    assert [(stage.tasks, stage.start, stage.stop) for stage in run.stages] == [("size", 0, 1), ("third", 1, 2)]
    found = run.regime.summary(run, run.regime.memory(run))
    assert found["without_steps"] == ["parity"] and found["backward_transfer"] is None


@pytest.mark.parametrize(
    "fields, said",
    [
        (dict(regime=REGIME | dict(order="parity,parity")), r"regime\.order"),
        (dict(regime=REGIME | dict(order="parity,nine")), "'nine'"),
    ],
)
def test_wrong_orders_are_refused(data, tmp_path, fields, said):
    with pytest.raises(InputError, match=said):
        opened(config(data, **fields), tmp_path)


def test_it_needs_held_out_rows(data):
    made = config(data, regime=REGIME)
    made.data.test_share = 0.0
    with pytest.raises(InputError, match=r"data\.test_share.*held-out"):
        loop.config_lib.validate(made)
