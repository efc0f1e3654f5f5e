"""Several runs in one step, in the loop: each an ordinary run; killed and resumed bit by bit; refusals by name."""

import json
import re
import shutil

import numpy as np
import pytest

from launch import flags
from launch import train as launch_train
from launch import verify as launch_verify
from molora_jax import config as config_lib
from molora_jax.config import several
from molora_jax.errors import InputError
from molora_jax.evaluation.run import load_run
from molora_jax.runs import saved, warm_start
from molora_jax.runs.checkpoints import load, read_manifest
from molora_jax.runs.metrics import is_timing
from molora_jax.runs.verify import verify
from molora_jax.training.group import train_together
from molora_jax.training.loop import train
from tests.faults import common, kills
from tests.training.test_stages import config as base_config
from tests.training.test_stages import stage, write

LISTS = "seed=0,1"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data") / "d.jsonl", "text")


def configs(data, lists=LISTS, **fields):
    plain = base_config(data, **{"save_every": 2, "eval_every": 2, "keep": 4} | fields)
    plain.optim.update(learning_rate=1e-3, eps=1e-5)  # a smaller eps makes whole steps of gradients that are rounding
    out = {name: flags.override(plain, changes) for name, changes in several.product(several.lists(lists)).items()}
    for one in out.values():
        config_lib.validate(one)
    return out


def together(made, folder):
    notes = []
    return train_together(made, folder, note=notes.append), notes


def tree(folder, step):
    return read_manifest(folder / "checkpoints" / str(step))["tree"]


def rows(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not is_timing(k)} for line in lines]


def near(a, b, step):
    """Two folders of one run: losses to 1e-5, adapters to a twentieth of one step of the rate 1e-3.

    Adam divides a gradient that is all rounding by itself: an entry was 1.7e-5 apart on one machine.
    """
    for one, other in zip(rows(a), rows(b), strict=True):
        assert one.keys() == other.keys()
        np.testing.assert_allclose(one["loss"], other["loss"], rtol=1e-5)
    left, right = ({"adapters": None} for _ in range(2))
    for side, folder in ((left, a), (right, b)):
        at = folder / "checkpoints" / str(step)
        side["adapters"] = load(at, read_manifest(at), ["adapters"])["adapters"]
    for x, y in zip(leaves(left), leaves(right), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def leaves(value):
    return [leaf for v in value.values() for leaf in leaves(v)] if isinstance(value, dict) else [np.asarray(value)]


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "grid"
    results, notes = together(configs(data), folder)
    return folder, results, notes


def test_every_run_of_a_group_is_an_ordinary_run(whole, data, tmp_path):
    folder, results, notes = whole
    made = configs(data)
    assert list(results) == list(made) and {r.step for r in results.values()} == {4}
    assert {p.name for p in folder.iterdir()} == {*made, "runs.json", "losses.png", "losses.pdf"}
    assert "2 runs in one step" in notes[0] and "8 devices (cpu), mesh data=8" in notes[1]
    assert sum("trainable" in note for note in notes) == 1
    assert all(name in notes[-4] for name in made) and "losses.png" in notes[-1]
    assert re.match(r"goodput \d+%", notes[-2]) and "evaluation" in notes[-2]
    speeds = [json.loads((folder / name / "metrics.jsonl").read_text().splitlines()[-1]) for name in made]
    assert all(row["time/tokens_per_second_device"] > 0 and row["time/data_seconds"] >= 0 for row in speeds)
    assert len({rows(folder / name)[-1]["loss"] for name in made}) == 2
    name, one = list(made.items())[-1]
    assert verify(folder / name, deep=True)["ok"]
    run = load_run(folder / name, "latest")
    assert run.config.seed == 1 and run.generate("Double 3", max_new_tokens=2) is not None
    train(one, str(tmp_path / "alone"), note=lambda text: None)
    near(folder / name, tmp_path / "alone", 4)
    assert tree(folder / name, 0) == tree(tmp_path / "alone", 0), "the start is the same, bit by bit"


def test_a_group_is_no_run_and_names_its_runs(whole, data, tmp_path):
    folder, _, _ = whole
    one = next(iter(configs(data).values()))
    message = r"got '.*grid', without config.json: the folder of a group of runs \(seed=0, seed=1\); expected the"
    for ask in (load_run, saved.read_config, verify, lambda at: launch_verify.run([f"--workdir={at}"])):
        with pytest.raises(InputError, match=f"{message}.*such as .*grid/seed=0"):
            ask(folder)
    with pytest.raises(InputError, match=f"train.init_from: {message}"):
        warm_start.newest(str(folder), where="train.init_from")
    with pytest.raises(InputError, match="the folder of a group of runs .seed=0, seed=1.; .*by --runs"):
        train(one, str(folder))
    assert not (folder / "lock").exists()
    copied = shutil.copytree(folder, tmp_path / "runs", ignore=shutil.ignore_patterns("runs.json"))
    with pytest.raises(InputError, match=r"a folder of runs \(seed=0, seed=1\)"):
        load_run(copied)
    with pytest.raises(InputError, match="a folder inside a run; .*Give the run itself: .*seed=0@4"):
        load_run(folder / "seed=0" / "checkpoints" / "4")


def test_a_group_goes_on_bit_by_bit(whole, data, tmp_path):
    folder, _, _ = whole
    made, parts = configs(data), tmp_path / "grid"
    together(configs(data, stop_after=2), parts)
    together(made, parts)
    for name in made:
        assert tree(parts / name, 4) == tree(folder / name, 4) and rows(parts / name) == rows(folder / name)


@pytest.mark.slow
def test_a_group_that_was_killed_between_two_saves_and_a_run_that_goes_on_by_itself(whole, data, tmp_path):
    folder, _, _ = whole
    made, parts = configs(data), tmp_path / "grid"
    together(configs(data, stop_after=2), parts)
    first, second = made
    train(made[first], str(parts / first), note=lambda text: None)  # the others have no step 4
    near(parts / first, folder / first, 4)
    _, notes = together(made, parts)
    assert f"{first}: back from step 4 to 2, the newest that all runs have" in notes
    for name in made:
        assert tree(parts / name, 4) == tree(folder / name, 4)
    _, notes = together(configs(data, stop_after=2), parts)
    assert any("nothing to do" in note for note in notes)
    shutil.rmtree(parts / first)
    with pytest.raises(InputError, match=r"steps of their own.*0.*4.*one step that all have"):
        together(made, parts)


@pytest.mark.slow
def test_killed_at_random_steps_each_run_ends_with_its_own_bits(tmp_path, monkeypatch):
    """More of the kind: `python -m tests.faults --full --only=kills.group`."""
    monkeypatch.setenv("MOLORA_FAULTS", str(tmp_path))
    monkeypatch.setenv("MOLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(common, "folder", lambda: tmp_path)
    assert kills.at_random_moments(1, 4, group=2) == []


@pytest.mark.slow
def test_stages_and_an_objective_that_looks_back(tmp_path):
    """A stage of each run has its own optimizer state; the reference of each is its own start."""
    data = write(tmp_path / "d.jsonl", "pair")
    fields = dict(
        objective=dict(name="preference", form="dpo", reference="start"), train_base="norms", batch_size=16,
        schedule=dict(s00=stage(steps=2), s01=stage(freeze="*/A")), eval_every=0,
    )  # fmt: skip
    made = configs(data, "optim.learning_rate=1e-3,2e-4;seed=0,1", **fields)
    _, notes = together(made, tmp_path / "grid")
    assert any("of stage s00, to step 2: other leaves train in s01" in note for note in notes)
    assert sum(note.startswith("stage s01, steps 3 to 4:") for note in notes) == 1
    for name, one in made.items():
        train(one, str(tmp_path / name), note=lambda text: None)
        near(tmp_path / "grid" / name, tmp_path / name, 4)


def test_what_may_not_differ_is_refused_with_the_reason(data, tmp_path):
    for lists, reason in (
        ("method.rules.all.adapter.rank=2,4", "what trains and of which shape"),
        ("data.seq_len=64,32", "the length of every row"),
        ("train.batch_size=8,16", "the shape of a batch"),
        ("optim.b2=0.9,0.99", "only learning_rate is an argument"),
        ("losses.balance.over=all,site", "only its weight is an argument"),
        ("base.source=random:tiny,random:tiny@1", "once, for all runs"),
        ("engine=gather,replicate", "share the mesh"),
        ("sed=0,1", "Did you mean 'seed'"), ("optim.learning_rat=1,2", "unknown field.*'optim.learning_rate'"),
        ("learning_rate=1,2", "Did you mean 'optim.learning_rate'"), ("train.stepss=1,2", "Did you mean 'train.steps'"),
        ("optm.learning_rate=1,2", "Did you mean 'optim.learning_rate'"), ("data.taks=a,b", "Did you mean 'tasks'"),
        ("losses.balanse.weight=1,2", "Did you mean 'balance'"),
        ("seed", "FIELD=VALUE"), ("", "FIELD=VALUE"), ("seed=0,1;seed=2", "twice"), ("seed=0,00", "two values"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=reason):
            configs(data, lists)
    with pytest.raises(InputError, match="optim.learning_rate"):
        configs(data, "optim.learning_rate=0.1,x")
    made = configs(data, "seed=0,1")
    for one in made.values():
        one.train.exact = True
    with pytest.raises(InputError, match="of one device and one run each"):
        together(made, tmp_path / "exact")
    other = write(tmp_path / "e.jsonl", "text", number=30)
    made = configs(data, f"data.tasks={data},{other}", steps=1)
    assert list(made) == ["tasks=d", "tasks=e"]
    for one in made.values():
        one.train.epochs = 2.0
    with pytest.raises(InputError, match="as many steps"):
        together(made, tmp_path / "epochs")
    assert not (tmp_path / "epochs" / "tasks=d" / "checkpoints" / "0").exists()


def test_the_names_of_runs_are_their_values():
    name = lambda *values: list(several.product([("a.b", list(values))]))  # noqa: E731
    assert name("-1", "1", "1.0", "1e-4", "-0.5", "+2") == ["b=-1", "b=1", "b=1.0", "b=0.0001", "b=-0.5", "b=2"]
    long, other = name("x" * 300, "x" * 299 + "y")
    assert len(long) < 70 and long != other, "a folder's name has an end"
    with pytest.raises(InputError, match="the name of a folder"):
        several.product([(f"field{i}", ["x" * 50]) for i in range(9)])


def test_the_command_line(data, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr("molora_jax.training.group.train_together", lambda made, folder: seen.update(made) or _done())
    argv = ["--config=configs/lora.py", f"--workdir={tmp_path}", "--config.base.source=random:tiny",
            "--runs=optim.learning_rate=1e-2,2e-3;seed=0,1"]  # fmt: skip
    launch_train.run(argv)
    assert list(seen) == [f"learning_rate={rate}_seed={seed}" for rate in (0.01, 0.002) for seed in (0, 1)]
    assert [one.optim.learning_rate for one in seen.values()] == [1e-2, 1e-2, 2e-3, 2e-3]
    with pytest.raises(InputError, match="--profile"):
        launch_train.run([*argv, "--profile"])


def _done():
    class Done:
        signal = None

    return {"": Done}
