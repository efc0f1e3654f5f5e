"""What is held out and what is left out: `data.valid`, `data.test_share`, the table and its warnings."""

import pytest

from molora_jax.data import build
from molora_jax.data.example import split_of
from molora_jax.errors import InputError
from tests.data.fakes import ByteTokenizer, config, numbered, write_rows


def make(tasks, **changes):
    return build(config(tasks, **changes), tokenizer=ByteTokenizer(), batch_size=2, seed=0)


def prompts(data, split):
    split = data.splits[split]
    return [split.example(i).prompt for i in range(len(split.length))]


def test_a_share_of_5_percent_is_the_split_of_old():
    import hashlib

    for i in range(3000):
        bucket = int.from_bytes(hashlib.sha256(f"t\0{i}".encode()).digest(), "big") % 100
        assert split_of("t", str(i)) == (0 if bucket < 90 else 1 if bucket < 95 else 2)


def test_shares(tmp_path):
    splits = {share: [split_of("t", str(i), share) for i in range(4000)] for share in (0.0, 0.001, 0.05, 0.2, 0.45)}
    for share, found in splits.items():
        assert found.count(1) == pytest.approx(4000 * share, abs=90) and found.count(2) == pytest.approx(
            4000 * share, abs=90
        )
    tested = {share: {i for i, split in enumerate(found) if split == 2} for share, found in splits.items()}
    assert tested[0.0] < tested[0.001] < tested[0.05] < tested[0.2] < tested[0.45], "more only adds"
    data = make(numbered(tmp_path / "a.jsonl", 50), test_share=0.0)
    assert len(prompts(data, "train")) == 50 and not prompts(data, "valid") and not data.heldout("test", 9)
    with pytest.raises(InputError, match="data.test_share"):
        make(numbered(tmp_path / "a.jsonl", 50), test_share=0.5)


def test_a_file_of_ones_own_is_held_out_and_all_else_trains(tmp_path):
    train, valid = numbered(tmp_path / "a.jsonl", 60), numbered(tmp_path / "v.jsonl", 70, prompt="v{}")
    data = make(train, valid=valid)
    assert data.task_names == ("a",), "rows without a task belong to the only one"
    assert len(prompts(data, "train")) == 60
    assert sorted(prompts(data, "valid")) == sorted(prompts(data, "test")) == sorted(f"v{i}" for i in range(70))
    assert {e.prompt for e in data.heldout("test", 99)} == {f"v{i}" for i in range(70)}
    row = data.report()["tasks"]["a"]
    assert (row["rows"], row["kept"]) == (130, 130) and data.report()["held_out"] == valid
    assert data.fingerprint not in (make(train).fingerprint, data.trained_fingerprint)
    assert data.trained_fingerprint == make(train).fingerprint
    other = make(train, valid=numbered(tmp_path / "w.jsonl", 71, prompt="v{}"))
    assert other.fingerprint != data.fingerprint
    assert all((other.train.batch(3)[k] == data.train.batch(3)[k]).all() for k in ("tokens", "targets", "task_ids"))


def test_tasks_of_a_validation_file(tmp_path):
    train = write_rows(
        tmp_path / "t.jsonl", [dict(prompt=f"{t}{i}", target="x", task=t) for t in "ab" for i in range(20)]
    )
    rows = [dict(prompt=f"new {t}{i}", target="x", task=t) for t in "bc" for i in range(5)] + [
        dict(prompt="?", target="y")
    ]
    rows += [dict(prompt="b1", target="x", task="b"), dict(prompt="long" * 99, target="x", task="c")]
    data = make(train, valid=write_rows(tmp_path / "v.jsonl", rows))
    for folder in "xy":
        (tmp_path / folder).mkdir()
    assert data.task_names == ("a", "b", "c", "v") and data.train.task_ids == (0, 1)
    counts = {name: (row["train"], row["valid"], row["skipped"]) for name, row in data.report()["tasks"].items()}
    assert counts == {"a": (20, 0, 0), "b": (20, 6, 0), "c": (0, 5, 1), "v": (0, 1, 0)}
    assert [e.task for e in data.heldout("valid", 1)] == ["b", "c", "v"]
    assert any("1 rows of data.valid are training rows of b" in line for line in data.report()["warnings"])
    assert "c" in str(data.report())
    two = ",".join(numbered(tmp_path / folder / "v.jsonl", 5, prompt=folder + "{}") for folder in "xy")
    assert make(train, valid=two).report()["tasks"]["v"]["valid"] == 10
    with pytest.raises(InputError, match="data.valid.*No such file"):
        make(train, valid="jsonl:none.jsonl")


def test_the_table_says_what_is_left_out(tmp_path):
    rows = [dict(prompt=f"p{i}", target="t") for i in range(20)]
    rows += [dict(prompt="long" * 40 + str(i), target="t") for i in range(5)] + rows[:3] + [dict(prompt=1)] * 2
    data = make(write_rows(tmp_path / "a.jsonl", rows), bad_rows="skip", test_share=0.0)
    row = data.report()["tasks"]["a"]
    assert (row["rows"], row["kept"], row["skipped"], row["repeats"], row["bad_rows"]) == (30, 20, 5, 3, 2)
    assert row["tokens"] == sum(len(data.splits["train"].tokens(i)) for i in range(20))
    text = str(data.report())
    assert "5 skipped, 3 repeats, 2 bad rows" in text and "warning: 10 of the 30 rows of a are left out" in text
    assert "raise it" in text and f"an epoch is {data.report()['epoch_steps']} steps" in text
    cut = make(write_rows(tmp_path / "a.jsonl", rows), bad_rows="skip", test_share=0.0, overlong="truncate").report()
    assert cut["tasks"]["a"]["truncated"] == 5 and "5 of the 30 rows of a are truncated" in str(cut)
    assert not make(numbered(tmp_path / "b.jsonl", 40)).report()["warnings"]


def test_an_epoch_draws_every_row_once(tmp_path):
    data = make(numbered(tmp_path / "a.jsonl", 45), test_share=0.0)
    seen = [i for row in range(data.train.epoch_rows()) for i in data.train.row(row)]
    assert sorted(seen) == list(range(45)) and data.train.epoch_steps() == -(-data.train.epoch_rows() // 2)
    assert data.report()["tasks"]["a"]["passes"] == 1.0


def test_a_comma_and_the_home_folder_in_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a,b").mkdir()
    numbered(tmp_path / "a,b" / "c,d.jsonl", 30)
    numbered(tmp_path / "v,w.jsonl", 30, prompt="v{}")
    data = make(r"jsonl:~/a\,b/c\,d.jsonl", valid=r"jsonl:~/v\,w.jsonl")
    assert data.task_names == ("c,d",) and len(prompts(data, "valid")) == 30
    assert data.train.for_tasks(r"c\,d").task_ids == (0,)
    with pytest.raises(InputError, match="data.tasks"):
        make("jsonl:~/a,b/c,d.jsonl")
