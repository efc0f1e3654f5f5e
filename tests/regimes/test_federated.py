"""Federated rounds in the loop: clients side by side, averages, resume, what a step holds, what is refused."""

import jax
import numpy as np
import pytest

from molora_jax import sharding
from molora_jax.core import trees
from molora_jax.data import clients as clients_lib
from molora_jax.errors import InputError
from molora_jax.evaluation.run import load_run
from molora_jax.runs.verify import verify
from molora_jax.runs.workdir import Workdir
from molora_jax.training import loop
from tests.regimes.small import DP, arrays, config, cut, digests, rows, start, write

FED = dict(name="federated", clients=2, local_steps=3, split="dirichlet", alpha=2.0)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """Two rounds of two clients and three local steps, never stopped."""
    workdir = tmp_path_factory.mktemp("whole")
    _, notes = start(config(data, regime=FED, optim="adamw", eval_every=6), workdir)
    return workdir, notes


def opened(made, folder):
    with Workdir(folder) as workdir:
        return loop.TrainingRun(made, workdir, note=lambda text: None)


def by_hand(made, folder):
    """The same run as a Python loop over clients: `(leaves after each round, state of the clients)`."""
    run = opened(made, folder)
    regime, stage = run.regime, run.stages[0]
    compiled, source = run.compiled(stage), run.source(stage)
    step = jax.jit(compiled.plain)
    seed = run.knobs[stage.name].seed
    knobs = regime.knobs(jax.device_get(run.knobs[stage.name]))
    server = jax.device_get(jax.jit(compiled.start)(run.params, seed))
    weights = np.array(source.sizes) / sum(source.sizes)
    out, turn = [], 0
    for stage in run.stages:
        states = []
        for k in range(regime.clients):
            state = server.replace(step=np.int32(turn))
            for t in range(turn, turn + (stage.stop - stage.start) // regime.clients):
                batch = sharding.put_batch(source.parts[k].batch(t), run.mesh, made.train.batch_size)
                own = jax.tree.map(lambda x, k=k: x[k], knobs)
                state, _ = step(state, run.params, batch, run.fixed(compiled.program.objective), own)
            states.append(jax.device_get(state))
        turn += (stage.stop - stage.start) // regime.clients
        mean = lambda *x: sum(w * leaf for w, leaf in zip(weights, x, strict=True)).astype(x[0].dtype)  # noqa: E731
        adapters, modules = (jax.tree.map(mean, *(getattr(s, n) for s in states)) for n in ("adapters", "modules"))
        opt = compiled.optimizer.init(trees.split(trees.joined(adapters, modules), compiled.frozen)[0])
        server = states[0].replace(adapters=adapters, modules=modules, opt=opt)
        out.append(adapters)
    return out


def test_clients_side_by_side_are_a_loop_over_clients(whole, data, tmp_path):
    """Acceptance 8 of FFA-LoRA's page, in the loop with Adam, whose moments begin anew each round."""
    made = config(data, regime=FED, optim="adamw")
    for step, adapters in zip((6, 12), by_hand(made, tmp_path), strict=True):
        got = arrays(whole[0], step)
        for path, leaf in got.items():
            rule, segment, site, name = path.split("/")
            np.testing.assert_allclose(leaf, adapters[rule][segment][site][name], rtol=1e-5, atol=1e-6, err_msg=path)


def test_a_round_ends_with_equal_clients_and_a_step_holds_their_mean(whole):
    sizes = clients_sizes(whole[1])
    assert len(sizes) == 2 and sizes[0] != sizes[1]
    for step in (2, 4, 6, 12):
        own, clients = arrays(whole[0], step), arrays(whole[0], step, "clients")
        for path, leaf in own.items():
            each = clients[f"adapters/{path}"]
            wanted = np.tensordot(np.array(sizes) / sum(sizes), each, 1)
            np.testing.assert_allclose(leaf, wanted, rtol=1e-5, atol=1e-7)
            assert (np.abs(each[0] - each[1]).max() > 0) == (step in (2, 4) and path.endswith("B")) or step in (2, 4)
            if step in (6, 12):
                np.testing.assert_array_equal(each[0], each[1])


def clients_sizes(notes):
    line = next(note for note in notes if "bytes up" in note).splitlines()[2]
    return [int(n) for n in line.split()[1:3]]


def test_the_metrics_and_the_table_hold_the_ledger(whole, data):
    lines = rows(whole[0])
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 12]
    assert all(len(line["clients/loss"]) == 2 for line in lines)
    ends = [line for line in lines if "bytes_up" in line]
    assert [line["step"] for line in ends] == [6, 12]
    B = sum(x.size for path, x in arrays(whole[0], 12).items())
    head = sum(x.size for x in arrays(whole[0], 12, "modules").values())
    assert ends[0]["bytes_up"] == 4 * (B + head) and ends[1]["bytes_total"] == 2 * 2 * 2 * ends[0]["bytes_up"]
    assert "valid_nll" in ends[0] and any("bytes, whole run" in note for note in whole[1])


def test_an_end_within_a_round_changes_no_bit(whole, data, tmp_path):
    folder = cut(whole[0], tmp_path / "run", 4)
    _, notes = start(config(data, regime=FED, optim="adamw", eval_every=6), folder)
    assert "resumed at step 4" in notes
    for step in (6, 12):
        assert digests(folder, step) == digests(whole[0], step)
    assert rows(folder) == rows(whole[0])


def test_the_result_is_an_ordinary_run(whole, data, tmp_path):
    run = load_run(whole[0], "latest")
    assert run.step == 12 and verify(whole[0], deep=True)["ok"]
    for path, leaf in arrays(whole[0], 12).items():
        rule, segment, site, name = path.split("/")
        np.testing.assert_array_equal(run.adapters[rule][segment][site][name], leaf)


def test_rounds_are_one_program(data, tmp_path):
    run = opened(config(data, regime=FED | dict(local_steps=1), steps=40), tmp_path)
    assert len(run.stages) == 20 and len(set(map(id, run.programs.values()))) == 1
    assert run.stages[-1].stop == 40 and len({id(run.source(stage)) for stage in run.stages}) == 1


def test_three_steps_of_three_clients_and_steps_that_do_not_divide(data, tmp_path):
    run = opened(config(data, regime=dict(name="federated", clients=3), steps=3), tmp_path / "3")
    assert [(s.start, s.stop) for s in run.stages] == [(0, 3)]
    run = opened(config(data, regime=dict(name="federated", clients=3, local_steps=2), steps=10), tmp_path / "10")
    assert run.config.train.steps == 9 and [(s.start, s.stop) for s in run.stages] == [(0, 6), (6, 9)]
    run = opened(config(data, regime=dict(name="federated", clients=4), steps=3), tmp_path / "4")
    assert run.config.train.steps == 4


@pytest.mark.parametrize("how", clients_lib.WAYS)
def test_every_example_has_one_client(data, tmp_path, how):
    made = config(data, regime=dict(name="federated", clients=3, split=how, skew=0.9, alpha=5.0))
    run = opened(made, tmp_path)
    source, stream = run.source(run.stages[0]), run.data.train
    ids = [np.concatenate([part.members(t) for t in part.task_ids]) for part in source.parts]
    every = np.concatenate(ids)
    assert len(every) == len(set(every.tolist())) == stream.size == sum(source.sizes)
    split = stream.split
    labels = np.array([split.tokens(i)[-1] for i in range(stream.size)])
    shares = np.array([[np.mean(labels[own] == c) for c in np.unique(labels)] for own in ids])
    if how == "task":
        assert all(len(part.task_ids) == 1 for part in source.parts)
    if how == "iid":
        assert np.ptp(shares, axis=0).max() < 0.1
    if how == "skew":
        counts = np.array([[np.sum(labels[own] == c) for c in np.unique(labels)] for own in ids])
        own = [counts[c % 3, c] / counts[:, c].sum() for c in range(counts.shape[1])]
        np.testing.assert_allclose(own, 0.9, atol=0.03)


def test_a_poisson_sample_is_one_example_a_row_drawn_on_its_own(data, tmp_path):
    run = opened(config(data, regime=dict(name="federated", clients=2, **DP)), tmp_path)
    (part, _), n = run.source(run.stages[0]).parts, run.source(run.stages[0]).sizes[0]
    drawn = [part.drawn(turn) for turn in range(400)]
    counts = np.array([len(ids) for ids in drawn])
    q = 4 / n
    assert abs(counts.mean() - 4) < 5 * np.sqrt(n * q * (1 - q) / 400) and counts.max() <= part.places
    assert abs(counts.var() / (n * q * (1 - q)) - 1) < 0.4, "of a binomial, not a fixed size"
    assert all(len(set(ids.tolist())) == len(ids) for ids in drawn) and part.places % 4 == 0
    batch = part.batch(7)
    assert (batch["segment_ids"].max(axis=1) > 0).sum() == counts[7] and batch["segment_ids"].max() == 1


REFUSED = {
    "noise without a clip": (dict(regime=FED | dict(dp_noise=1.0)), r"regime\.dp_clip"),
    "more clients than tasks": (dict(regime=FED | dict(split="task", clients=4)), r"regime\.clients"),
    "a client without rows": (dict(regime=FED | dict(clients=300, split="iid")), r"regime\.split.*client"),
    "a batch larger than a client": (
        dict(regime=FED | dict(clients=12, split="iid", **DP), batch_size=32, steps=24), r"train\.batch_size"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_cannot_train_is_refused_before_anything_is_compiled(data, tmp_path, case):
    fields, said = REFUSED[case]
    with pytest.raises(InputError, match=said):
        opened(config(data, **fields), tmp_path)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda c: c.train.update(exact=True, batch_size=8), r"train\.exact"),
        (lambda c: c.schedule.update(s01=c.schedule.s00.copy_and_resolve_references()), "schedule: got 2 stages"),
        (lambda c: c.schedule.s00.update(steps=12), r"schedule\.s00\.steps"),
        (lambda c: c.losses.update(ewc=dict(weight=1.0)), r"losses\.ewc.*continual"),
        (lambda c: c.schedule.s00.set.update(regime=dict(name="stages")), r"set\.regime"),
        (lambda c: c.regime.update(local_step=3), r"regime\.local_step.*local_steps"),
        (lambda c: c.regime.update(name="federate"), r"regime\.name.*federated"),
    ],
)
def test_a_config_that_excludes_it_is_refused_without_jax(data, change, said):
    made = config(data, regime=FED)
    with made.unlocked(), pytest.raises(InputError, match=said):
        change(made)
        loop.config_lib.validate(made)
