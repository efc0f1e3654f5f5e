"""Files that are not held in memory: the same arrays as from those that are, in blocks, sorted on disk; parquet."""

import decimal
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


def write(tmp_path, table, **options):
    import pyarrow.parquet

    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet", **options)
    return f"parquet:{tmp_path / 'rows.parquet'}"


def test_a_column_that_json_does_not_have_is_refused_where_it_is_used(tmp_path):
    import pyarrow as pa

    odd = dict(
        date=pa.array([1, 2], pa.date32()), far=pa.array([0, 2**31 - 1], pa.date32()), blob=[b"\xff", b"x"],
        time=pa.array([1, 10**17 + 1], pa.timestamp("ns")), price=[decimal.Decimal("1.1")] * 2, nan=[float("nan"), 1.0],
        deep=[[dict(a=b"x")], None], pairs=pa.array([[("a", 1)], None], pa.map_(pa.string(), pa.int32())),
        torn=pa.array([b"good", b"\xff"]).view(pa.string()),
    )  # fmt: skip
    entry = write(tmp_path, pa.table(dict(prompt=["q1", "q2"], target=["a1", "a2"], **odd)))
    task = made(entry).report()["tasks"]["rows"]
    assert task["kept"] == 2 and set(task["unused"]) == {f"field {name!r}" for name in odd}
    assert made(entry, fields="drop=date").report()["tasks"]["rows"]["kept"] == 2
    for name, row, got in (
        ("date", 1, "date of type date"), ("time", 1, "time that cannot be read"), ("blob", 1, "blob of type bytes"),
        ("price", 1, "price of type decimal"), ("nan", 1, "nan, which is nan"), ("far", 1, "far of type date"),
        ("deep", 1, r"deep\[0\].a of type bytes"), ("torn", 2, "torn with a byte 0xff that is not UTF-8"),
        ("pairs", 1, r"pairs\[0\] of type map"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=f"row {row}: got {got}.*drop="):
            made(entry, fields=f"target={name}")
    report = made(entry, fields="target=torn", bad_rows="skip").report()["tasks"]["rows"]
    assert (report["bad_rows"], report["kept"]) == (1, 1)


def test_a_name_twice_in_a_parquet_file_is_refused(tmp_path):
    import pyarrow as pa

    two = pa.array(["a"]), pa.array(["b"])
    table = pa.Table.from_arrays([*two, pa.array(["c"])], names=["prompt", "prompt", "target"])
    with pytest.raises(InputError, match="the field 'prompt' twice"):
        made(write(tmp_path, table))
    turn = pa.StructArray.from_arrays(two, names=["content", "content"])
    with pytest.raises(InputError, match="the field 'messages.content' twice"):
        made(write(tmp_path, pa.table(dict(messages=pa.ListArray.from_arrays([0, 1], turn)))))


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
