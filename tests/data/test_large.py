"""Files that are not held in memory: the same arrays as from those that are, in blocks, sorted on disk; parquet."""

import json

import numpy as np
import pytest

from molora_jax.data import build, jsonl, read
from molora_jax.errors import InputError
from tests.data.fakes import ByteTokenizer, config


def rows_of(count=300):
    """Several tasks, repeats, rows of weight 0, chats, unused fields; not in order."""
    rng = np.random.default_rng(0)
    for i in rng.permutation(count).tolist():
        row = dict(prompt=f"Question {i % 250}?", target=f"answer {i % 250 % 7}")
        if i % 3 == 0:
            row["task"] = "third"
        if i % 11 == 0:
            row |= dict(weight=0)
        if i % 13 == 0:
            row |= dict(color="red")
        if i % 17 == 0:
            row = dict(messages=[dict(role="user", content=f"Hi {i}"), dict(role="assistant", content="Hello.")])
        yield row


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows_of())) + "\n")
    return path


def made(entry, **changes):
    return build(config(entry, **changes), tokenizer=ByteTokenizer(), batch_size=2, seed=0)


def as_large(monkeypatch):
    monkeypatch.setattr(jsonl, "LARGE", 100)
    monkeypatch.setattr(read, "LARGE_ROWS", 10)
    monkeypatch.setattr(read, "BLOCK", 16)
    monkeypatch.setattr("molora_jax.data.spilled.PIECE", 32)
    monkeypatch.setattr("molora_jax.data.split.AT_ONCE", 10)
    monkeypatch.setattr("molora_jax.data.encode._own_code", lambda: "large")  # nothing of it is in the cache


def same(one, two):
    assert one.fingerprint == two.fingerprint and one.task_names == two.task_names
    assert one.report() == two.report()
    for a, b in zip(one.tasks, two.tasks, strict=True):
        for name in ("ids", "mask", "offsets", "context", "lead", "split", "packed_texts", "texts_at"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
        assert list(a.texts) == list(b.texts) and len(a.texts) == len(a.split)
    for step in (0, 7):
        batches = one.train.batch(step), two.train.batch(step)
        assert all(np.array_equal(batches[0][k], batches[1][k]) for k in batches[0])
    assert one.heldout("test", 5) == two.heldout("test", 5)


@pytest.mark.parametrize("file_tasks", [True, False])
def test_a_large_file_gives_what_a_small_one_does(file, monkeypatch, file_tasks):
    small = made(f"jsonl:{file}", file_tasks=file_tasks)
    as_large(monkeypatch)
    same(small, made(f"jsonl:{file}", file_tasks=file_tasks))
    same(small, made(f"jsonl:{file}", file_tasks=file_tasks))  # from the cache, mapped
    assert isinstance(made(f"jsonl:{file}").tasks[0].ids, np.memmap)


@pytest.mark.parametrize("large", [False, True])
def test_parquet_gives_what_jsonl_does(file, tmp_path, monkeypatch, large):
    import pyarrow as pa
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.Table.from_pylist(list(rows_of()), schema=schema(pa)), tmp_path / "rows.parquet")
    small = made(f"jsonl:{file}")
    if large:
        as_large(monkeypatch)
    same(small, made(f"parquet:{tmp_path / 'rows.parquet'}"))
    with pytest.raises(InputError, match="parquet:PATH"):
        made(f"jsonl:{tmp_path / 'rows.parquet'}")
    with pytest.raises(InputError, match="expected a parquet file"):
        made(f"parquet:{file}")


def schema(pa):
    text, turn = pa.string(), pa.struct([("role", pa.string()), ("content", pa.string())])
    fields = dict(prompt=text, target=text, task=text, weight=pa.int64(), color=text, messages=pa.list_(turn))
    return pa.schema(list(fields.items()))


def test_parquet_without_pyarrow_is_a_clear_line(file, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(InputError, match=r"no pyarrow.*molora_jax\[parquet\]"):
        made(f"parquet:{file}")


@pytest.mark.parametrize(
    "bad, said",
    [(b'{"prompt": "a"', "row 41.*cut off"), (b'{"prompt": "a"}\n', "row 41"), (b"\xff\n", "row 41.*UTF-8"),
     (b'{"prompt": "' + b"x" * 200 + b'", "target": "b"}\n', "row 41.*a row of .* bytes")],
)  # fmt: skip
def test_a_bad_row_of_a_large_file_is_named(tmp_path, monkeypatch, bad, said):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"".join(b'{"prompt": "%d", "target": "b"}\n' % i for i in range(40)) + bad)
    as_large(monkeypatch)
    monkeypatch.setattr(jsonl, "MOST_BYTES", 150)
    with pytest.raises(InputError, match=said):
        made(f"jsonl:{path}")
    skipped = made(f"jsonl:{path}", bad_rows="skip").report()["tasks"]["rows"]
    assert skipped["bad_rows"] == 1 and skipped["kept"] == 40
