"""Files of a user: both forms, and every way for a row to be bad."""

import json

import pytest

from configs.common import get_config
from molora_jax.config import validate
from molora_jax.data import build, jsonl
from molora_jax.errors import InputError
from tests.data.fakes import ByteTokenizer, config, numbered, write_rows

GOOD = json.dumps(dict(prompt="good", target="yes")).encode()
BAD = {
    "not JSON": (b"{prompt: 1}", "invalid JSON"),
    "not UTF-8": (b'{"prompt": "caf\xe9", "target": "x"}', "0xe9"),
    "no target": (b'{"prompt": "a"}', "'target'"),
    "no prompt": (b'{"target": "a"}', "'prompt'"),
    "an empty object": (b"{}", "'prompt'"),
    "empty prompt": (b'{"prompt": " ", "target": "x"}', "empty prompt"),
    "empty target": (b'{"prompt": "a", "target": ""}', "empty target"),
    "a number for text": (b'{"prompt": 3, "target": "x"}', "number"),
    "null for text": (b'{"prompt": null, "target": "x"}', "null"),
    "a list": (b'["a", "b"]', "a JSON list"),
    "a string": (b'"a"', "a JSON string"),
    "a number for the task": (b'{"prompt": "a", "target": "x", "task": 1}', "task of type number"),
    "half a surrogate": (b'{"prompt": "\\ud800", "target": "x"}', "surrogate"),
    "nested too deep": (b"[" * 100_000, "invalid JSON"),
    "a number too long": (b'{"prompt": ' + b"1" * 5000 + b"}", "invalid JSON"),
    "messages that are no list": (b'{"messages": "hi"}', "messages of type string"),
    "no messages": (b'{"messages": []}', "roles []"),
    "a message that is no object": (b'{"messages": ["hi"]}', "messages[0] of type string"),
    "an unknown role": (b'{"messages": [{"role": "bot", "content": "x"}]}', "'bot'"),
    "a late system turn": (
        b'{"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "x"}]}',
        "messages[1].role",
    ),
    "no answer": (b'{"messages": [{"role": "user", "content": "x"}]}', "roles ['user']"),
    "no question": (b'{"messages": [{"role": "assistant", "content": "x"}]}', "roles ['assistant']"),
    "a message without content": (b'{"messages": [{"role": "user"}]}', "content"),
}


def make(path, **changes):
    return build(config(f"jsonl:{path}", **changes), tokenizer=ByteTokenizer(), batch_size=2, seed=0)


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_named(tmp_path, case):
    row, got = BAD[case]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + b"\n\n" + row + b"\n" + GOOD + b"\n")
    with pytest.raises(InputError) as error:
        make(path)
    assert f"{path}, row 3" in str(error.value) and got in str(error.value)
    assert "expected" in str(error.value) and "data.bad_rows" in error.value.fix
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_skipped_and_counted(tmp_path, case):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + b"\n" + BAD[case][0] + b"\n")
    data = make(path, bad_rows="skip")
    row = data.report()["tasks"]["rows"]
    assert row["bad_rows"] == 1 and row["train"] + row["valid"] + row["test"] == 1


def test_a_half_written_last_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + b"\n" + GOOD[:-7])
    with pytest.raises(InputError, match=r"row 2: .*cut off"):
        make(path)
    assert make(path, bad_rows="skip").report()["tasks"]["rows"]["bad_rows"] == 1


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("content", [b"", b"\n\n  \n", b"\xef\xbb\xbf \n" + b" " * 3000])
def test_an_empty_file(tmp_path, monkeypatch, content, large):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    if large:
        monkeypatch.setattr(jsonl, "LARGE", -1)
        monkeypatch.setattr(jsonl, "MOST_BYTES", 1000)
    for bad_rows in ("error", "skip"):
        with pytest.raises(InputError, match="empty file"):
            make(path, bad_rows=bad_rows)


def test_a_row_behind_much_white_space_is_not_lost(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "q", "target": "a"}\n' + b" " * 5000 + b'{"prompt": "r", "target": "b"}\n')
    monkeypatch.setattr(jsonl, "LARGE", -1)
    monkeypatch.setattr(jsonl, "MOST_BYTES", 1000)
    with pytest.raises(InputError, match="row 2: got a row of 5,031 bytes"):
        make(path)


def test_one_file_under_two_names_is_named_twice(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "q", "target": "a"}\n{"prompt": "r", "target": "b"}\n')
    (tmp_path / "link.jsonl").symlink_to(path)
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path)
    for other in ("rows.jsonl", f"{tmp_path}/a/../rows.jsonl", "./rows.jsonl", f"{tmp_path}//rows.jsonl", "link.jsonl"):
        both = f"jsonl:{path},jsonl:{other}"
        with pytest.raises(InputError, match=r"data.tasks: got .*rows.jsonl.* one file; expected every task once"):
            build(config(both), tokenizer=ByteTokenizer(), batch_size=1, seed=0)
        with pytest.raises(InputError, match=r"data.valid: got .*rows.jsonl.* one file; expected every task once"):
            make(path, valid=both)
        whole = get_config()
        whole.data.tasks = both
        with pytest.raises(InputError, match="which are one file"):
            validate(whole)


@pytest.mark.parametrize("valid", ["{}", "sentiment", ",", "jsonl:{},{}"])
def test_held_out_rows_are_files(tmp_path, valid):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "q", "target": "a"}\n')
    with pytest.raises(InputError, match="^data.valid: got .*; expected jsonl:PATH or parquet:PATH"):
        make(path, valid=valid.format(path, path))


def test_no_file_a_folder_and_only_bad_rows(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        make(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="directory"):
        make(tmp_path)
    (tmp_path / "bad.jsonl").write_bytes(b"{}\n[]\n")
    with pytest.raises(InputError, match="2 bad rows and no good one.*row 1"):
        make(tmp_path / "bad.jsonl", bad_rows="skip")


def test_windows_line_ends_a_bom_and_repeats(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD + b"\r\n" + GOOD)
    assert make(path).report()["tasks"]["rows"]["repeats"] == 1


def test_chat_rows(tmp_path):
    turns = [("system", "be brief"), ("user", "hi"), ("assistant", "yes?"), ("user", "2+2?"), ("assistant", "4")]
    rows = [dict(messages=[dict(role=r, content=c) for r, c in turns[start:]]) for start in (0, 1, 3)]
    data = build(
        config(write_rows(tmp_path / "c.jsonl", rows), system="S"), tokenizer=ByteTokenizer(), batch_size=1, seed=0
    )
    examples = [data.splits[s].example(i) for s in data.splits for i in range(len(data.splits[s].length))]
    tokenizer = ByteTokenizer()
    texts = {tuple(e.context_ids) for e in examples}
    assert texts == {
        tuple(tokenizer.encode(text))
        for text in (
            "\x03be brief\x02hi\x04yes?\x022+2?\x04",
            "\x03S\x02hi\x04yes?\x022+2?\x04",
            "\x03S\x022+2?\x04",
        )
    }
    assert {tuple(e.target_ids) for e in examples} == {(ord("4") + 5, 1)}


def test_names(tmp_path):
    (tmp_path / "other").mkdir()
    one = numbered(tmp_path / "train.jsonl", 9)
    two = numbered(tmp_path / "other" / "train.jsonl", 8)
    named = numbered(tmp_path / "x.jsonl", 7, task="trivia")
    shadow = numbered(tmp_path / "math.jsonl", 6)
    data = build(config(f"{one},{two},{named},{shadow},math"), tokenizer=ByteTokenizer(), batch_size=1, seed=0)
    assert data.task_names == ("train", "train-2", "trivia", "math-2", "math")


def test_the_fingerprint_knows_content_not_paths(tmp_path):
    one, two = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    numbered(one, 30)
    numbered(two, 30)
    assert make(one).fingerprint == make(two).fingerprint
    assert make(two).task_names == ("b",)
    assert [e.prompt for e in make(one).heldout("test", 9)] == [e.prompt for e in make(two).heldout("test", 9)]
    numbered(two, 31)
    assert make(one).fingerprint != make(two).fingerprint


def test_overlong(tmp_path):
    rows = [dict(prompt=f"p{i}", target="t") for i in range(20)]
    rows += [dict(prompt="begin" + "x" * 100 + "end", target="answer"), dict(prompt="q", target="y" * 80)]
    path = tmp_path / "rows.jsonl"
    write_rows(path, rows)
    skip = make(path).report()["tasks"]["rows"]
    assert (skip["skipped"], skip["truncated"]) == (2, 0)
    data = make(path, overlong="truncate")
    cut = data.report()["tasks"]["rows"]
    assert (cut["skipped"], cut["truncated"]) == (1, 1)
    examples = [s.example(i) for s in data.splits.values() for i in range(len(s.length))]
    (long,) = [e for e in examples if e.target == "answer"]
    assert len(long.context_ids) + len(long.target_ids) - 1 == 64
    assert ByteTokenizer().decode(long.context_ids).endswith("xend")
    with pytest.raises(InputError, match=r"task 'rows', item of group .*data.seq_len=64"):
        make(path, overlong="error")


def test_nothing_fits(tmp_path):
    path = tmp_path / "rows.jsonl"
    numbered(path, 30, target="y" * 90)
    with pytest.raises(InputError, match="no training example that fits"):
        make(path)
