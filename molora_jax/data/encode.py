"""From examples to ids: one `Task` of flat arrays per entry of `data.tasks`.

`render.py` says what the ids of an example are, and which of them are trained on. Lengths are not limited here:
`split.py` applies `data.seq_len` and `data.overlong`.
"""

import dataclasses
import datetime
import functools
import hashlib
import json
import pathlib

import numpy as np

from molora_jax.data import cache, jsonl, packages, render
from molora_jax.data.example import distinct, split_of
from molora_jax.data.sources import SOURCES
from molora_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Task:
    """All examples of one entry, N of them, in a deterministic order.

    ids: [sum of lengths] int32, context and target of each example one after another. mask: [sum of lengths] uint8, 1
    where an id is trained on. offsets: [N + 1] int64 into both. context: [N] int32, how many ids stand before the last
    answer, 0 in plain text. lead: [N] int32, how many of the answer's ids the template puts before its text. split: [N]
    uint8. content: digest of the examples as text. texts: JSON of [prompt, target, group], decoded only when asked for.
    """

    entry: str
    name: str
    ids: np.ndarray
    mask: np.ndarray
    offsets: np.ndarray
    context: np.ndarray
    lead: np.ndarray
    split: np.ndarray
    content: str
    choices: tuple[str, ...] | None
    dropped: dict[str, int]
    packed_texts: np.ndarray

    @functools.cached_property
    def texts(self) -> list:
        return cache.unpack_json(self.packed_texts)


@dataclasses.dataclass(frozen=True)
class Options:
    """How conversations become ids: fields of `config.data` (`template_args` parsed)."""

    system: str = ""
    train_on: str = "last"
    template_args: dict = dataclasses.field(default_factory=dict)


def load_task(entry: str, *, tokenizer, digest: str | None, options: Options, bad_rows: str) -> Task:
    """One entry of `data.tasks` from the cache, else from its source (`digest=None`: no cache)."""
    if entry.startswith("jsonl:"):
        path = entry.removeprefix("jsonl:")
        raw = jsonl.content(path)
        source = f"{hashlib.sha256(raw).hexdigest()} {bad_rows}"
        read = functools.partial(_read_jsonl, raw, path=path, bad_rows=bad_rows)
    else:
        module = SOURCES[entry]
        files = module.files()
        source = f"{packages.digest_files(files)} {identity(entry)}"
        read = functools.partial(_read_package, entry, files)
    key = hashlib.sha256(repr((_own_code(), source, digest, options)).encode()).hexdigest()[:32]
    arrays = cache.load(key) if digest else None
    if arrays is None:
        arrays = _encode(*read(), tokenizer=tokenizer, options=options, entry=entry, bad_rows=bad_rows)
        if digest:
            cache.save(key, arrays)
    meta = cache.unpack_json(arrays["meta"])
    name = meta["name"]
    if not name:  # a file's stem: not cached, for the file may be renamed
        name = path.replace("\\", "/").rsplit("/", 1)[-1].rsplit(".", 1)[0]
    return Task(
        entry=entry,
        name=name,
        choices=tuple(meta["choices"]) if meta["choices"] else None,
        dropped=meta["dropped"],
        packed_texts=arrays["texts"],
        content=hashlib.sha256(arrays["texts"].tobytes() + meta["more"].encode()).hexdigest(),
        **{field: arrays[field] for field in ("ids", "mask", "offsets", "context", "lead", "split")},
    )


def identity(entry: str) -> str:
    """What the examples of a task depend on beside files: code and package versions."""
    module = SOURCES[entry]
    more = getattr(module, "identity", str)()
    return f"{entry} {module.FILTERS} {module.DISTRIBUTION} {packages.version(module.DISTRIBUTION)} {more}".strip()


@functools.lru_cache
def _own_code() -> str:
    """Digest of the source of data and templates: a change of a filter never meets an old cache entry."""
    root = pathlib.Path(__file__).parent
    paths = [*root.rglob("*.py"), *(root.parent / "io").glob("t*.py")]
    return packages.digest_files(sorted((path.relative_to(root.parent).as_posix(), path) for path in paths))


def tokenizer_digest(tokenizer) -> str | None:
    """What makes two tokenizers write the same ids: `Tokenizer.digest()`, and the day where the template tells it.

    None, where it has none, turns the cache off.
    """
    digest = getattr(tokenizer, "digest", None)
    digest = digest() if callable(digest) else digest
    if not digest:
        return None
    day = (tokenizer.day or datetime.date.today().isoformat()) if getattr(tokenizer, "depends_on_day", False) else ""
    return f"{digest} {day}".strip()


def _read_package(entry: str, files):
    module = SOURCES[entry]
    try:
        examples, problem = distinct(module.examples(files), several_answers=several_answers(entry)), "no example"
    except (ValueError, LookupError, TypeError, AttributeError, OSError) as error:  # files of another format
        examples, problem = [], f"{type(error).__name__}: {error}"
    if not examples:
        raise InputError(
            f"data.tasks, task {entry!r}",
            got=f"{problem} in the files of {module.DISTRIBUTION} {packages.version(module.DISTRIBUTION)}",
            expected="the file format of the pinned version",
            fix="Install the pinned versions: `pip install 'molora_jax[data]'`.",
        )
    return entry, entry, examples, {}


def several_answers(entry: str) -> bool:
    return getattr(SOURCES[entry], "SEVERAL_ANSWERS", False)


def _read_jsonl(raw: bytes, *, path: str, bad_rows: str):
    name, examples, bad = jsonl.parse(raw, path=path, bad_rows=bad_rows)
    named = {example.task for example in examples} == {name}
    kept = distinct(examples, several_answers=True)
    dropped = {"bad rows": bad, "repeats": len(examples) - len(kept)}
    return name if named else "", jsonl.SPLIT_KEY, kept, dropped


def _encode(name, split_key, examples, dropped, *, tokenizer, options, entry, bad_rows) -> dict[str, np.ndarray]:
    if tokenizer.eos_id is None:
        raise InputError(
            "base.source",
            got="a tokenizer without an end token",
            expected="one whose answers can end",
            fix="Name an eos_token in its tokenizer_config.json.",
        )
    encoded = render.encode_examples(tokenizer, examples, **dataclasses.asdict(options))
    examples, encoded, dropped = _good(examples, encoded, dropped, entry=entry, bad_rows=bad_rows)
    ids = np.concatenate([np.asarray(one.ids, np.int32) for one in encoded])
    if ids.min() < 0 or ids.max() >= tokenizer.vocab_size:
        raise InputError(
            f"data.tasks, {entry}",
            got=f"token ids from {ids.min()} to {ids.max()}",
            expected=f"ids below the vocabulary size {tokenizer.vocab_size}",
            fix="The tokenizer and the model do not belong together.",
        )
    texts = [[example.prompt, example.target, example.group] for example in examples]
    more = [[i, example.more] for i, example in enumerate(examples) if example.more is not None]
    more = hashlib.sha256(json.dumps(more, sort_keys=True).encode()).hexdigest() if more else ""
    meta = dict(name=name, choices=examples[0].choices, dropped=dropped, more=more)
    return dict(
        ids=ids,
        mask=np.concatenate([np.asarray(one.loss_mask, np.uint8) for one in encoded]),
        offsets=np.cumsum([0, *(len(one.ids) for one in encoded)]).astype(np.int64),
        context=np.asarray([one.context for one in encoded], np.int32),
        lead=np.asarray([one.lead for one in encoded], np.int32),
        split=np.asarray([split_of(split_key, example.group) for example in examples], np.uint8),
        texts=cache.pack_json(texts),
        meta=cache.pack_json(meta),
    )


def _good(examples, encoded, dropped, *, entry, bad_rows):
    """Without the rows that became no ids: an error that names the first, or skipped and counted."""
    file = entry.startswith("jsonl:")
    bad = [i for i, one in enumerate(encoded) if isinstance(one, render.Refused)]
    if not bad:
        return examples, encoded, dropped
    first = min(bad, key=lambda i: examples[i].row)
    example, why = examples[first], encoded[first]
    where = f"{entry.removeprefix('jsonl:')}, row {example.row}" if file else f"data.tasks, task {entry!r}"
    skip = 'Correct the row, or set `data.bad_rows="skip"`.' if file else f"The item: {example.prompt!r:.80}"
    error = InputError(where, got=why.got, expected=why.expected, fix=f"{why.fix} {skip}".strip())
    if bad_rows == "error" or not file:
        raise error
    if len(bad) == len(examples):
        raise InputError(
            where.rsplit(",", 1)[0], got=f"{len(bad)} rows that become no ids, and no good one",
            expected="at least one good row", fix=f"First: {error}",
        )  # fmt: skip
    out = set(bad)
    kept = [i for i in range(len(examples)) if i not in out]
    dropped = {**dropped, "bad rows": dropped.get("bad rows", 0) + len(bad)}
    return [examples[i] for i in kept], [encoded[i] for i in kept], dropped
