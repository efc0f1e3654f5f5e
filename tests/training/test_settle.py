"""What a config says only once the data are read: steps of epochs, names of tasks inside files."""

import json
import types

import pytest

from configs import common
from molora_jax import config as config_lib
from molora_jax.data import build
from molora_jax.errors import InputError
from molora_jax.evaluation.report import no_items
from molora_jax.runs.identity import compare, identity
from molora_jax.runs.workdir import Workdir
from molora_jax.training.settle import settle
from tests.data.fakes import ByteTokenizer, write_rows


@pytest.fixture
def made(tmp_path):
    rows = [dict(prompt=f"{t}{i}", target="x", task=t) for t in "ab" for i in range(20)]
    config = common.get_config()
    config.data.update(tasks=write_rows(tmp_path / "f.jsonl", rows), seq_len=64, test_share=0.0)
    config.train.batch_size = 4
    config.method.rules = dict(attn=common.rule("q", adapter=common.adapter(), experts="4",
                                                router=dict(name="softmax_topk", k=2, share="site")))  # fmt: skip
    data = build(config.data, tokenizer=ByteTokenizer(), batch_size=4, seed=0)
    return config, data


def test_epochs_set_the_steps(made):
    config, data = made
    rows = data.train.epoch_rows()
    for epochs, steps in ((1.0, -(-rows // 4)), (2.0, -(-2 * rows // 4)), (0.01, 1), (10.0, -(-10 * rows // 4))):
        config.train.epochs = epochs
        settled, names = settle(config, data)
        assert (settled.train.steps, settled.train.epochs) == (steps, epochs) and names == ("a", "b")
    assert config.train.steps == 200, "the caller's stays"
    config.train.epochs = 1e6
    with pytest.raises(InputError, match="train.epochs|at most"):
        config.train.epochs = 1e10
        settle(config, data)
    config.train.epochs = 0.0
    assert settle(config, data)[0].train.steps == 200


def test_stages_are_checked_against_the_steps_of_the_epochs(made):
    config, data = made
    config.train.epochs = 1.0
    config.schedule.s00.steps = 150
    config.schedule.s01 = dict(steps=0, tasks="", freeze="", set=dict(), route="")
    config_lib.validate(config)  # not known yet
    with pytest.raises(InputError, match="schedule"):
        settle(config, data)
    config.train.epochs = 1000.0
    assert settle(config, data)[0].train.steps > 150


def test_tasks_inside_files_have_names(made):
    config, data = made
    entry = config.data.tasks
    config.losses = dict(localized_balance=dict(weight=0.1, world="b"))
    config.schedule.s00.tasks = "a"
    config_lib.validate(config)
    assert settle(config, data)[1] == ("a", "b")
    config.losses.localized_balance.world = entry
    assert settle(config, data)[1] == (entry, entry)
    for field, change in (
        ("losses.localized_balance.world", lambda c: c.losses.localized_balance.update(world="c")),
        ("schedule.s00.tasks", lambda c: c.schedule.s00.update(tasks="b,c")),
    ):
        wrong = config.copy_and_resolve_references()
        change(wrong)
        config_lib.validate(wrong)
        with pytest.raises(InputError, match=f"{field}.*'c'.*some of a, b, jsonl"):
            settle(wrong, data)


def test_a_run_from_before_these_fields_is_the_same_run():
    now = common.get_config().to_dict()
    older = ("tasks", "seq_len", "temperature", "system", "overlong", "bad_rows")
    old = {**now, "data": {name: now["data"][name] for name in older}}
    extra = dict(base_digest="b", data_fingerprint="d")
    begun = identity(old, extra)
    other = {**now, "data": {**now["data"], "valid": "jsonl:a", "file_tasks": False}}
    assert not compare(begun, identity(now, extra))[0]
    assert not compare(begun, identity(other, extra))[0], "the fingerprint tells these"
    for name, value in dict(train_on="all", raw=True, test_share=0.1, format="alpaca", fields="prompt=q").items():
        changed = {**now, "data": {**now["data"], name: value}}
        assert (
            compare(begun, identity(changed, extra))[0] and compare(identity(now, extra), identity(changed, extra))[0]
        )


def test_a_run_that_began_with_one_task_a_file_goes_on_so(tmp_path):
    config, lines = common.get_config(), []
    with Workdir(tmp_path / "run") as workdir:
        assert workdir.followed(config, lines.append).data.file_tasks is True and not lines
        (tmp_path / "run" / "checkpoints" / "4").mkdir(parents=True)
        for saved, want in (({}, False), ({"file_tasks": False}, False), ({"file_tasks": True}, True)):
            (tmp_path / "run" / "config.json").write_text(json.dumps({"data": saved}))
            assert workdir.followed(config, lines.append).data.file_tasks is want
        assert len(lines) == 2 and "file_tasks" in lines[0]
        for damage in ("", "[]", '{"data": 3}', "{"):
            (tmp_path / "run" / "config.json").write_text(damage)
            assert workdir.followed(config, lines.append).data.file_tasks is True


@pytest.mark.parametrize(
    ("data", "where"),
    [
        (dict(test_share=0.0, valid=""), "data.test_share.*data.valid"),
        (dict(test_share=0.05, valid=""), "data.tasks.*5.0%"),
        (dict(test_share=0.0, valid="jsonl:v"), "data.valid.*no row of jsonl:v"),
    ],
)
def test_an_evaluation_says_what_it_cannot_report(data, where):
    error = no_items(types.SimpleNamespace(get=lambda name, otherwise: data[name]))
    with pytest.raises(InputError, match=where):
        raise error
