"""Bad rows among good ones: refused with file and row, or skipped and counted; the good ones are all there."""

import json
import random

from molora_jax import data
from molora_jax.errors import InputError
from molora_jax.io.tokenizer import byte_tokenizer
from tests.faults.common import scratch, tiny_config
from tests.faults.report import each

BAD = (
    b'{"prompt": "a\xff", "target": "b"}', b'{"prompt": "a", "targ', b'{"prompt": "a"}', b'{"target": "b"}',
    b'{"prompt": "a", "target": ""}', b'{"prompt": "  ", "target": "b"}', b'["a", "b"]', b"3", b"null", b'"text"',
    b'{"prompt": 3, "target": "b"}', b'{"prompt": "a", "target": null}', b'{"prompt": "a", "target": "\\ud800"}',
    b'{"messages": []}', b'{"messages": [{"role": "user", "content": "a"}]}', b'{"messages": "a"}',
    b'{"messages": [{"role": "nobody", "content": "a"}, {"role": "assistant", "content": "b"}]}',
    b'{"messages": [{"role": "assistant"}]}', b"{", b"\x00\x01\x02", b'{"prompt": "a", "target": "b"} {"prompt": 1}',
    b"[" * 100_000, b'{"prompt": "a", "target": {"b": 1}}', b'{"prompt": "a", "target": true}', b"# a comment",
)  # fmt: skip


def bad_rows(seed, tries):
    config, tokenizer = tiny_config(), byte_tokenizer()

    def one(number):
        rng = random.Random(number)
        good = [json.dumps({"prompt": f"Double {i}", "target": str(2 * i)}).encode() for i in range(40)]
        bad = rng.sample(BAD, rng.randrange(1, 6))
        lines = [(line, True) for line in good] + [(line, False) for line in bad]
        rng.shuffle(lines)
        for _ in range(rng.randrange(3)):
            lines.insert(rng.randrange(len(lines)), (rng.choice((b"", b"  ", b"\r")), None))
        text = b"\n".join(line for line, _ in lines) + rng.choice((b"", b"\n", b"\r\n", b"\n\n"))
        text = rng.choice((b"", b"\xef\xbb\xbf")) + text
        first = next(i for i, (_, right) in enumerate(lines, start=1) if right is False)
        with scratch() as path:
            file = path / "rows.jsonl"
            file.write_bytes(text)
            config.data.tasks = f"jsonl:{file}"
            return _named_and_counted(config, tokenizer, file, first=first, bad=len(bad))

    return each(seed, tries, one)


def _named_and_counted(config, tokenizer, file, *, first, bad) -> str:
    """What is wrong with how `bad` rows, `first` the first of them, among 40 good ones are told of; ""."""
    config.data.bad_rows = "error"
    try:
        data.build(config.data, tokenizer=tokenizer, batch_size=8, seed=0)
        return "bad rows were not refused"
    except InputError as error:
        if str(file) not in str(error) or f"row {first}:" not in str(error):
            return f"the error does not name the file and row {first}: {error}"
    config.data.bad_rows = "skip"
    built = data.build(config.data, tokenizer=tokenizer, batch_size=8, seed=0)
    (row,) = built.report()["tasks"].values()
    counts = row.get("bad_rows", 0), row["train"] + row["valid"] + row["test"]
    return "" if counts == (bad, 40) else f"{bad} bad and 40 good rows were counted as {counts}"


ASKED, ANSWERED = dict(role=b"user", content=b"a"), dict(role=b"assistant", content=b"b")
PAIR = dict(prompt=b"a", target=b"b")
BAD_PARQUET = (
    dict(prompt=b"a\xff", target=b"b"), dict(prompt=b"a", target=b"\xed\xa0\x80"), dict(prompt=b"a"), dict(target=b"b"),
    {}, dict(prompt=b"a", target=b""), dict(prompt=b" ", target=b"b"), dict(messages=[]), dict(messages=[ASKED]),
    dict(messages=[ASKED, dict(role=b"nobody", content=b"b")]), dict(messages=[ASKED, dict(role=b"assistant")]),
    dict(messages=[ASKED, dict(role=b"assistant", content=b"\xfe")]), PAIR | dict(messages=[ASKED, ANSWERED]),
    PAIR | dict(weight=0.5), PAIR | dict(weight=float("nan")), PAIR | dict(image=b"\x89PNG"), PAIR | dict(task=b"a,b"),
)  # fmt: skip


def bad_parquet_rows(seed, tries):
    """As `bad_rows`, in a parquet file. Its columns of text are written as bytes, so that one may hold what is none."""
    import pyarrow as pa
    import pyarrow.parquet

    config, tokenizer = tiny_config(), byte_tokenizer()
    turn = lambda text: pa.list_(pa.struct([("role", text), ("content", text)]))  # noqa: E731
    schema = lambda text: pa.schema([  # noqa: E731
        ("prompt", text), ("target", text), ("messages", turn(text)), ("weight", pa.float64()), ("image", pa.binary()),
        ("task", text), ("day", pa.date32()),
    ])  # fmt: skip

    def one(number):
        rng = random.Random(number)
        good = [dict(prompt=b"Double %d" % i, target=b"%d" % (2 * i), day=i) for i in range(40)]
        bad = rng.sample(BAD_PARQUET, rng.randrange(1, 6))
        rows = good + bad
        rng.shuffle(rows)
        table = pa.Table.from_pylist(rows, schema=schema(pa.binary()))
        columns = [column.combine_chunks() for column in table.columns]
        columns = [_as_text(pa, c, f.type) for c, f in zip(columns, schema(pa.string()), strict=True)]
        with scratch() as path:
            file = path / "rows.parquet"
            table = pa.Table.from_arrays(columns, schema=schema(pa.string()))
            options = dict(compression=rng.choice(("snappy", "gzip", "none")), row_group_size=rng.choice((7, 1000)))
            pyarrow.parquet.write_table(table, file, **options)
            config.data.tasks = f"parquet:{file}"
            first = next(i for i, row in enumerate(rows, start=1) if any(row is other for other in bad))
            return _named_and_counted(config, tokenizer, file, first=first, bad=len(bad))

    return each(seed, tries, one)


def _as_text(pa, array, wanted):
    """The same buffers under a type with `string` in place of `binary`."""
    if array.type == wanted:
        return array
    buffers = array.buffers()
    if pa.types.is_list(wanted):
        fields = [array.values.field(i).view(pa.string()) for i in range(2)]
        inner = pa.StructArray.from_arrays(fields, fields=list(wanted.value_type))
        return pa.Array.from_buffers(wanted, len(array), buffers[:2], array.null_count, children=[inner])
    return array.view(wanted)


def unusable(seed, tries):
    """Files without a row that can be used are refused by name, whatever data.bad_rows says."""
    config, tokenizer = tiny_config(), byte_tokenizer()
    contents = (b"", b"\n\n", b"\xef\xbb\xbf", b"{", b"\xff\xfe", b"[]", b"\0" * 100, b'{"prompt": "a"}\n' * 5)

    def one(number):
        with scratch() as path:
            file = path / "rows.jsonl"
            content = contents[number % len(contents)]
            file.write_bytes(content) if number % 9 else file.mkdir()
            config.data.update(tasks=f"jsonl:{file}", bad_rows=("skip", "error")[number % 2])
            try:
                data.build(config.data, tokenizer=tokenizer, batch_size=8, seed=0)
            except InputError as error:
                return "" if str(file) in str(error) else f"the error does not name the file: {error}"
            return f"{content[:30]!r} was taken"

    return each(seed, tries, one)


def process_counts(seed, tries):
    """The global sequence of samples is the same for every number of processes and every start."""
    config, tokenizer = tiny_config(), byte_tokenizer()
    stream = data.build(config.data, tokenizer=tokenizer, batch_size=8, seed=3).train

    def one(number):
        rng = random.Random(number)
        first, processes = rng.randrange(40), rng.choice((2, 4, 8))
        each_rows, wanted = 8 // processes, []
        whole = stream.iterate(first, rows=slice(0, 8))
        parts = [stream.iterate(first, rows=slice(i * each_rows, (i + 1) * each_rows)) for i in range(processes)]
        again = stream.iterate(max(0, first - 3), rows=slice(0, 8))
        for _ in range(first - max(0, first - 3)):
            next(again)
        try:
            for _ in range(3):
                _, batch = next(whole)
                wanted = batch["example_ids"]
                joined = [row for part in parts for row in next(part)[1]["example_ids"].tolist()]
                if joined != wanted.tolist():
                    return f"{processes} processes from step {first} saw other samples"
                if next(again)[1]["example_ids"].tolist() != wanted.tolist():
                    return f"a start at step {first} saw other samples than one that came there"
        finally:
            for iterator in (whole, again, *parts):
                iterator.close()
        return ""

    return each(seed, tries, one)
