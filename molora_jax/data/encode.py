"""From examples to ids: one `Task` of flat arrays per task.

`render.py` says what the ids of an example are, and which of them are trained on. Lengths are not limited here:
`split.py` applies `data.seq_len` and `data.overlong`.
"""

import dataclasses
import datetime
import functools
import hashlib
import pathlib

import numpy as np

from molora_jax.config.resolve import file_of, resolve_template_args
from molora_jax.data import cache, labelled, packages, render, traces
from molora_jax.data.example import split_of
from molora_jax.data.options import Options
from molora_jax.data.packed import Columns, JsonList, Texts
from molora_jax.data.read import Read, source, stem
from molora_jax.data.spilled import Spilled
from molora_jax.errors import InputError
from molora_jax.io.templates import Deaths

LONGEST_SHOWN = 60  # characters of a template's text in a message


@dataclasses.dataclass(frozen=True)
class Task:
    """All examples of one task, N of them, in a deterministic order.

    entry: of `data.tasks`, which may hold several tasks.
    ids: [sum of lengths] int32, context and target of each example one after another. mask: [sum of lengths] uint8, 1
    where an id is trained on. offsets: [N + 1] int64 into both. context: [N] int32, how many ids stand before the last
    answer, 0 in plain text. lead: [N] int32, how many of the answer's ids the template puts before its text. split: [N]
    uint8. content: digest of the examples as text. packed_texts: JSON of [prompt, target, group], of a multiple choice
    also [offered, turns, tools, text], at `texts_at`.
    dropped: why rows were left out -> how many. unused: what of the kept rows has no use -> in how many.
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
    unused: dict[str, int]
    packed_texts: np.ndarray
    texts_at: np.ndarray
    unnamed: bool = False  # a file's rows without a task of their own
    fields: tuple[str, ...] = ()  # the names of `data.fields` that its rows have
    also_trained: int = 0  # rows of data.valid that are training rows as well
    asked: tuple[str, int] = ("", 0)  # `Ids.asked` of the first row that has it, and in how many rows it does
    unit: int = 1  # consecutive examples that belong together: the chosen and the rejected answer of a pair
    labels: tuple[str, ...] = ()  # of labelled texts: names of the classes, whose number is an example's last id

    @functools.cached_property
    def texts(self) -> Texts:
        return Texts(self.packed_texts, self.texts_at)


def load_tasks(
    entry: str, *, tokenizer, digest: str | None, options: Options, field: str = "data.tasks"
) -> tuple[Task, ...]:
    """The tasks of one entry, from the cache, else from its source (`digest=None`: no cache)."""
    depends, read = source(entry, options, field=field)
    how = (options.system, options.train_on, options.template_args, options.test_share)
    key = hashlib.sha256(repr((_own_code(), depends, digest, how)).encode()).hexdigest()[:32]
    arrays = cache.load(key) if digest else None
    if arrays is None:
        reads = read()
        deaths = Deaths(1) if options.bad_rows == "error" else Deaths()
        encoded = [_encode(task, tokenizer=tokenizer, options=options, deaths=deaths) for task in reads]
        if not any(encoded):
            raise reads[0].none_left()
        encoded = [task for task in encoded if task is not None]
        arrays = {f"{i}.{name}": array for i, task in enumerate(encoded) for name, array in task.items()}
        if digest:
            cache.save(key, arrays)
            if any(isinstance(task.examples, Spilled) for task in reads):
                arrays = cache.load(key) or arrays  # the temporaries give way
        for task in reads:
            if isinstance(task.examples, Spilled):
                task.examples.close()
    tasks = []
    while f"{len(tasks)}.meta" in arrays:
        tasks.append(_task(entry, {name: arrays[f"{len(tasks)}.{name}"] for name in ARRAYS}))
    return tuple(tasks)


NUMBERS = ("ids", "mask", "offsets", "context", "lead", "split")
ARRAYS = (*NUMBERS, "texts", "texts_at", "meta")


def _task(entry, arrays) -> Task:
    meta = cache.unpack_json(arrays["meta"])
    return Task(
        entry=entry,
        name=meta["name"] or stem(file_of(entry)),  # a file's stem: not cached, it may be renamed
        choices=tuple(meta["choices"]) if meta["choices"] else None,
        dropped=meta["dropped"],
        unused=meta["unused"],
        unnamed=not meta["name"],
        fields=tuple(meta["fields"]),
        unit=meta["unit"],
        labels=tuple(meta["labels"]),
        asked=tuple(meta["asked"]),
        packed_texts=arrays["texts"],
        texts_at=arrays["texts_at"],
        content=meta["content"],
        **{field: arrays[field] for field in NUMBERS},
    )


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


def _encode(read: Read, *, tokenizer, options: Options, deaths: Deaths) -> dict[str, np.ndarray] | None:
    """The arrays of a task; None where no row is left."""
    if tokenizer.eos_id is None:
        raise InputError(
            "base.source",
            got="a tokenizer without an end token",
            expected="one whose answers can end",
            fix="Name an eos_token in its tokenizer_config.json.",
        )
    labels = read.labels if options.reads == "label" else []
    columns = Columns(cache.place(), on_disk=isinstance(read.examples, Spilled))
    texts, more = JsonList(columns, ensure_ascii=False), JsonList(sort_keys=True)
    asked, choices = ["", 0], None
    for block in read.blocks():
        examples, encoded, own = _encode_block(block, tokenizer, options, labels, deaths)
        if not examples:
            continue
        if own:
            asked = [asked[0] or own[0][:LONGEST_SHOWN], asked[1] + len(own)]
        choices = choices if texts.count else examples[0].choices
        more.extend([[i, e.more] for i, e in enumerate(examples, start=texts.count) if e.more is not None])
        texts.extend([
            [e.prompt, e.target, e.group, *([[e.offered, e.turns, e.tools, e.text]] * bool(e.offered))]
            for e in examples
        ])  # fmt: skip
        ids = np.concatenate([np.asarray(result.ids, np.int32) for result in encoded])
        if ids.min() < 0 or ids.max() >= tokenizer.vocab_size:
            raise InputError(
                f"data.tasks, {read.path or read.name}",
                got=f"token ids from {ids.min()} to {ids.max()}",
                expected=f"ids below the vocabulary size {tokenizer.vocab_size}",
                fix="The tokenizer and the model do not belong together.",
            )
        columns.add("ids", ids)
        columns.add("mask", np.concatenate([np.asarray(result.loss_mask, np.uint8) for result in encoded]))
        columns.add("lengths", np.asarray([len(result.ids) for result in encoded], np.int64))
        columns.add("context", np.asarray([result.context for result in encoded], np.int32))
        columns.add("lead", np.asarray([result.lead for result in encoded], np.int32))
        places = [split_of(read.split_key, e.group, options.test_share) for e in examples]
        columns.add("split", np.asarray(places, np.uint8))
    if not texts.count:
        return None
    texts.end()
    more = more.end().hexdigest() if more.count else ""
    content = texts.total.copy()
    content.update(more.encode())
    meta = dict(
        name=read.name, choices=choices, dropped=read.dropped, unused=read.unused, fields=sorted(read.fields),
        unit=2 if options.reads == "pair" else 1, labels=labels, asked=asked, content=content.hexdigest(),
    )  # fmt: skip
    lengths = columns.done("lengths")
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    arrays = {name: columns.done(name) for name in ("ids", "mask", "context", "lead", "split", "texts", "texts_at")}
    return arrays | dict(offsets=offsets, meta=cache.pack_json(meta))


def _encode_block(read: Read, tokenizer, options: Options, labels: list[str], deaths: Deaths):
    """`(examples, ids of each, what they are asked with)` of some rows that are held in memory, without those that are
    left out."""
    chat = functools.partial(
        render.encode_examples, tokenizer, system=options.system, train_on=options.train_on,
        template_args=resolve_template_args(options.template_args), deaths=deaths,
    )  # fmt: skip
    if options.reads == "label":
        encoded = labelled.encode(tokenizer, read.examples, labels)
    elif options.reads == "pair":
        sides = chat(read.examples), chat([example.rejected for example in read.examples])
        encoded = [labelled.both(*pair) for pair in zip(*sides, strict=True)]
    else:
        encoded = chat(read.examples)
    refused = [
        (e, result) for e, result in zip(read.examples, encoded, strict=True) if isinstance(result, render.Refused)
    ]
    read.leave_out(refused, bad_rows=options.bad_rows, died=deaths.count if deaths.too_many else 0)
    encoded = [result for result in encoded if not isinstance(result, render.Refused)]
    encoded = traces.drop_untraced(read, encoded, system=options.system, bad_rows=options.bad_rows)
    examples, asked = read.examples, [result.asked for result in encoded if result.asked]
    if options.reads == "pair":
        # a template may write two answers alike
        same = [result.chosen.ids == result.rejected.ids for result in encoded]
        read.dropped["ties"] += sum(same)
        examples = [e for e, tie in zip(examples, same, strict=True) if not tie]
        encoded = [result for result, tie in zip(encoded, same, strict=True) if not tie]
        examples = [side for e in examples for side in (e, e.rejected)]
        encoded = [side for result in encoded for side in (result.chosen, result.rejected)]
    return examples, encoded, asked
