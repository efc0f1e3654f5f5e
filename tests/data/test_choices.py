"""Rows with choices and an answer, and the two families of opt-in tasks."""

import json
import pathlib
import sys
import tarfile
import types

import pytest

from configs import common
from molora_jax import config as config_lib
from molora_jax import data as data_lib
from molora_jax.data.sources import bigbench, find, reasoning
from molora_jax.errors import InputError
from molora_jax.io.tokenizer import byte_tokenizer

ROW = dict(prompt="Is ice cold?", choices=["no", "yes", "never"], answer=1)


def _data(path, **fields):
    config = common.get_config().data
    config.update(tasks=f"jsonl:{path}", seq_len=256, test_share=0.4, **fields)
    return data_lib.build(config, tokenizer=byte_tokenizer(), batch_size=4, seed=0)


def _file(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _held_out(path, **fields):
    return _data(path, **fields).heldout("test", 100)


def test_a_choice_is_learnt_as_its_answer_and_keeps_the_others(tmp_path):
    rows = [ROW | dict(prompt=f"Is ice cold? {i}", answer=[1, "yes"][i % 2]) for i in range(20)]
    rows.append(dict(prompt="Is snow cold?", target="yes"))
    items = _held_out(_file(tmp_path / "a.jsonl", rows))
    found = [item for item in items if item.offered]
    assert len(found) >= 3
    for item in found:
        assert item.target == "yes" and [each.target for each in item.offered] == ["no", "yes", "never"]
        assert {each.prompt for each in item.offered} == {item.prompt}


def test_turns_and_plain_text(tmp_path):
    rows = [ROW | dict(prompt=f"Is ice cold? {i}", system="Be short.") for i in range(20)]
    (item, *_) = _held_out(_file(tmp_path / "a.jsonl", rows))
    assert [each.conversation() for each in item.offered] == [
        [{"role": "system", "content": "Be short."}, {"role": "user", "content": item.prompt.split("user: ")[1]},
         {"role": "assistant", "content": answer}] for answer in ("no", "yes", "never")
    ]  # fmt: skip
    rows = [ROW | dict(prompt=f"Is ice cold? {i}:", choices=[" no", " yes"]) for i in range(20)]
    (item, *_) = _held_out(_file(tmp_path / "b.jsonl", rows), raw=True)
    assert [each.text for each in item.offered] == [f"{item.prompt} no", f"{item.prompt} yes"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(answer=3), "answer 3; expected one of the choices, or its place from 0 to 2"),
        (dict(answer="maybe"), "answer 'maybe'"),
        (dict(answer=True), "answer True"),
        (dict(choices=["one"]), "1 choices"),
        (dict(choices="ab"), "choices of type"),
        (dict(choices=["a", "a"]), "a choice twice"),
        (dict(choices=["a", ""]), r"choices\[1\]"),
        (dict(target="yes"), "several forms"),
    ],
)
def test_bad_choices(tmp_path, change, words):
    with pytest.raises(InputError, match=words) as error:
        _data(_file(tmp_path / "a.jsonl", [ROW | change]))
    assert "row 1" in str(error.value)


SOCIAL = {
    "canary": "BENCHMARK DATA canary GUID 1", "name": "social", "task_prefix": "Q: ",
    "examples": [
        {"input": f"Who is kind? {i}", "target_scores": {"Ann": int(i % 2 == 0), "Bob": int(i % 2)}} for i in range(6)
    ] + [{"input": "Say hi", "target": ["hi", "hello"]}],
}  # fmt: skip


def _archive(folder) -> pathlib.Path:
    inside = folder / "bigbench-1.0.0" / "bigbench" / "benchmark_tasks" / "social"
    inside.mkdir(parents=True)
    (inside / "task.json").write_text(json.dumps(SOCIAL))
    with tarfile.open(folder / "bigbench.tar.gz", "w:gz") as archive:
        archive.add(folder / "bigbench-1.0.0", arcname="bigbench-1.0.0")
    return folder / "bigbench.tar.gz"


def test_bigbench(tmp_path, monkeypatch):
    monkeypatch.setenv("MOLORA_CACHE", str(tmp_path / "cache"))
    archive = _archive(tmp_path)
    monkeypatch.setenv("MOLORA_BIGBENCH", str(archive))
    source = find("bb:social")
    files = source.files()
    assert json.loads(files[0][1].read_text()) == SOCIAL  # whole, the canary too
    items = list(source.examples(files))
    assert [item.target for item in items] == ["Ann", "Bob", "Ann", "Bob", "Ann", "Bob", "hi"]
    assert items[0].prompt == "Q: Who is kind? 0\n  choice: Ann\n  choice: Bob" and items[0].offered == ("Ann", "Bob")
    assert items[-1].offered is None and all(SOCIAL["canary"] in item.group for item in items)
    monkeypatch.delenv("MOLORA_BIGBENCH")
    assert find("bb:social").files() == files  # from the cache
    with pytest.raises(InputError, match="no BIG-bench.*pip download"):
        find("bb:other").files()
    for root in (archive, archive.parent):
        monkeypatch.setenv("MOLORA_BIGBENCH", str(root))
        with pytest.raises(InputError, match="bb:other.*no other/task.json"):
            find("bb:other").files()
    monkeypatch.setenv("MOLORA_BIGBENCH", str(tmp_path / "bigbench-1.0.0" / "bigbench" / "benchmark_tasks"))
    config = common.get_config().data
    config.update(tasks="bb:social", seq_len=256, test_share=0.4)
    data = data_lib.build(config, tokenizer=byte_tokenizer(), batch_size=2, seed=0)
    assert data.task_names == ("bb:social",)


def test_reasoning_gym_judges_answers_itself(monkeypatch):
    """With a stand-in of the package's two functions; the package itself in the slow test below."""
    items = [{"question": f"{i}+1?", "answer": str(i + 1), "metadata": {}} for i in range(30)]

    class Made(list):
        def score_answer(self, answer, entry):
            return float(answer.strip() in (entry["answer"], f"{entry['answer']}.0")) or 0.01

    gym, factory = types.ModuleType("reasoning_gym"), types.ModuleType("reasoning_gym.factory")
    factory.DATASETS, gym.create_dataset = {"sums": None}, lambda name, size, seed: Made(items)
    monkeypatch.setitem(sys.modules, "reasoning_gym", gym)
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", factory)
    reasoning._dataset.cache_clear(), reasoning._entries.cache_clear()
    try:
        source = find("rg:sums")
        assert [(e.prompt, e.target) for e in source.examples([])] == [(f"{i}+1?", str(i + 1)) for i in range(30)]
        assert source.verify("4+1?", "5.0") and not source.verify("4+1?", "6")
        with pytest.raises(InputError, match="rg:sum.*Did you mean"):
            list(find("rg:sum").examples([]))
    finally:
        reasoning._dataset.cache_clear(), reasoning._entries.cache_clear()


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(InputError, match=r"rg:chain_sum.*pip install \"molora_jax\[reasoning\]\""):
        list(reasoning.Task("chain_sum").examples([]))


def test_a_package_that_reasoning_gym_lacks_is_named_in_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", types.ModuleType("reasoning_gym"))
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    config = common.get_config().data
    config.update(tasks="rg:chain_sum")
    with pytest.raises(InputError) as caught:
        data_lib.build(config, tokenizer=byte_tokenizer(), batch_size=4, seed=0)
    assert str(caught.value).count("got ") == 1 and "no package reasoning_gym.factory" in str(caught.value)


@pytest.mark.parametrize("entry", ["rg:chain_sum", "bb:goal_step_wikihow/goal_inference"])
def test_families_are_entries_of_data_tasks(entry):
    config = common.get_config()
    config.data.tasks = f"morph,{entry}"
    config.method.rules = dict(all=common.rule("q,v", adapter=common.adapter()))
    config_lib.validate(config)
    config.data.tasks = entry.replace(":", ":/")
    with pytest.raises(InputError, match="rg:NAME"):
        config_lib.validate(config)


def test_bigbench_names_the_command():
    assert bigbench.HOW in bigbench.Task.FIX
