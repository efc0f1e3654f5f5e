"""From examples to ids: one `Task` of flat arrays per entry of `data.tasks`.

The context of an example is the model's own chat template around its turns, with the generation prompt at the end;
each is rendered (a template may depend on its text). The target is the bare answer and the end token; the loss is on
the target only. Lengths are not limited here: `split.py` applies `data.seq_len` and `data.overlong`.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib

import numpy as np

from molora_jax.data import cache, packages, traces
from molora_jax.data.example import split_of
from molora_jax.data.options import Options
from molora_jax.data.read import Read, source, stem
from molora_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Task:
    """All examples of one task, N of them, in a deterministic order.

    entry: of `data.tasks`, which may hold several tasks.
    ids: [sum of lengths] int32, context and target of each example one after another.
    offsets: [N + 1] int64 into `ids`. context: [N] int32 lengths of the contexts. split: [N] uint8.
    content: digest of the examples as text. texts: JSON of [prompt, target, group], decoded only when asked for.
    dropped: why rows were left out -> how many. unused: what of the kept rows has no use -> in how many.
    """

    entry: str
    name: str
    ids: np.ndarray
    offsets: np.ndarray
    context: np.ndarray
    split: np.ndarray
    content: str
    choices: tuple[str, ...] | None
    dropped: dict[str, int]
    unused: dict[str, int]
    packed_texts: np.ndarray
    unnamed: bool = False  # a file's rows without a task of their own
    fields: tuple[str, ...] = ()  # the names of `data.fields` that its rows have
    also_trained: int = 0  # rows of data.valid that are training rows as well

    @functools.cached_property
    def texts(self) -> list:
        return cache.unpack_json(self.packed_texts)


def load_tasks(
    entry: str, *, tokenizer, digest: str | None, options: Options, field: str = "data.tasks"
) -> tuple[Task, ...]:
    """The tasks of one entry, from the cache, else from its source (`digest=None`: no cache)."""
    depends, read = source(entry, options, field=field)
    how = (options.system, options.template_args, options.test_share)
    key = hashlib.sha256(repr((_own_code(), depends, digest, how)).encode()).hexdigest()[:32]
    arrays = cache.load(key) if digest else None
    if arrays is None:
        encoded = [_encode(one, tokenizer=tokenizer, options=options) for one in read()]
        encoded = [one for one in encoded if one is not None]
        if not encoded:
            raise InputError(entry, got="bad rows and no good one", expected="at least one row that the template takes",
                             fix='The reasons: set `data.bad_rows="error"`.')  # fmt: skip
        arrays = {f"{i}.{name}": array for i, one in enumerate(encoded) for name, array in one.items()}
        if digest:
            cache.save(key, arrays)
    tasks = []
    while f"{len(tasks)}.meta" in arrays:
        tasks.append(_task(entry, {name: arrays[f"{len(tasks)}.{name}"] for name in ARRAYS}))
    return tuple(tasks)


ARRAYS = ("ids", "offsets", "context", "split", "texts", "meta")


def _task(entry, arrays) -> Task:
    meta = cache.unpack_json(arrays["meta"])
    return Task(
        entry=entry,
        name=meta["name"] or stem(entry.removeprefix("jsonl:")),  # a file's stem: not cached, it may be renamed
        choices=tuple(meta["choices"]) if meta["choices"] else None,
        dropped=meta["dropped"],
        unused=meta["unused"],
        unnamed=not meta["name"],
        fields=tuple(meta["fields"]),
        packed_texts=arrays["texts"],
        content=hashlib.sha256(arrays["texts"].tobytes() + meta["more"].encode()).hexdigest(),
        **{field: arrays[field] for field in ("ids", "offsets", "context", "split")},
    )


@functools.lru_cache
def _own_code() -> str:
    """Digest of this package's source: a change of a filter never meets an old cache entry."""
    root = pathlib.Path(__file__).parent
    return packages.digest_files(sorted((path.relative_to(root).as_posix(), path) for path in root.rglob("*.py")))


def tokenizer_digest(tokenizer) -> str | None:
    """What makes two tokenizers the same: the tokenizer's own `digest`, else its serialised form.

    None, where it has neither, turns the cache off.
    """
    digest = getattr(tokenizer, "digest", None)
    digest = digest() if callable(digest) else digest
    if not digest and hasattr(getattr(tokenizer, "inner", None), "to_str"):
        digest = hashlib.sha256(tokenizer.inner.to_str().encode()).hexdigest()
    if not digest:
        return None
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    chats = [tokenizer.chat(turns[i:], add_generation_prompt=True) for i in range(2)]
    return repr((digest, tokenizer.vocab_size, tokenizer.eos_id, chats))


def _encode(read: Read, *, tokenizer, options: Options) -> dict[str, np.ndarray] | None:
    """The arrays of a task; None where no row is left."""
    if tokenizer.eos_id is None:
        raise InputError(
            "base.source",
            got="a tokenizer without an end token",
            expected="one whose answers can end",
            fix="Name an eos_token in its tokenizer_config.json.",
        )
    if not options.raw:
        traces.drop_untraced(read, tokenizer, options)
    examples, flat, lengths, contexts = [], [], [], []
    for example, result in zip(read.examples, encode_rows(tokenizer, read.examples, options), strict=True):
        if isinstance(result, Exception):
            read.bad(result, example, bad_rows=options.bad_rows)
            continue
        context, target = result
        examples.append(example)
        flat += context
        flat += target
        lengths.append(len(context) + len(target))
        contexts.append(len(context))
    if not examples:
        return None
    ids = np.asarray(flat, np.int32)
    if ids.min() < 0 or ids.max() >= tokenizer.vocab_size:
        raise InputError(
            f"data.tasks, {read.path or read.name}",
            got=f"token ids from {ids.min()} to {ids.max()}",
            expected=f"ids below the vocabulary size {tokenizer.vocab_size}",
            fix="The tokenizer and the model do not belong together.",
        )
    texts = [[example.prompt, example.target, example.group] for example in examples]
    more = [[i, example.more] for i, example in enumerate(examples) if example.more is not None]
    more = hashlib.sha256(json.dumps(more, sort_keys=True).encode()).hexdigest() if more else ""
    meta = dict(
        name=read.name, choices=examples[0].choices, dropped=read.dropped, unused=read.unused,
        fields=sorted(read.fields),
        more=more,
    )  # fmt: skip
    splits = [split_of(read.split_key, example.group, options.test_share) for example in examples]
    return dict(
        ids=ids,
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        context=np.asarray(contexts, np.int32),
        split=np.asarray(splits, np.uint8),
        texts=cache.pack_json(texts),
        meta=cache.pack_json(meta),
    )


def encode_rows(tokenizer, examples, options: Options) -> list:
    """(context ids, target ids with the end token) of each example, or the error of its row."""
    try:
        return _encode_rows(tokenizer, examples, options)
    except InputError:
        pass
    results = []
    for example in examples:
        try:
            results += _encode_rows(tokenizer, [example], options)
        except InputError as error:
            results.append(error)
    return results


def _encode_rows(tokenizer, examples, options: Options):
    if options.raw:
        contexts = [tokenizer.encode(example.prompt)[:] if example.prompt else [] for example in examples]
    else:
        contexts = _encode_chats(tokenizer, [_turns(example, options.system) for example in examples])
    targets = _encode_texts(tokenizer, [example.target for example in examples])
    end = [tokenizer.eos_id]
    return [(context, target + end) for context, target in zip(contexts, targets, strict=True)]


def _turns(example, system: str) -> list[dict[str, str]]:
    turns = example.conversation()[:-1]
    if system and turns[0]["role"] not in ("system", "developer"):
        turns = [{"role": "system", "content": system}, *turns]
    return turns


def _encode_chats(tokenizer, chats) -> list[list[int]]:
    texts = [tokenizer.chat(chat, add_generation_prompt=True) for chat in chats]
    one = functools.partial(tokenizer.encode_chat, add_generation_prompt=True)
    return _in_bulk(tokenizer, texts, chats, one)


def _encode_texts(tokenizer, texts) -> list[list[int]]:
    return _in_bulk(tokenizer, texts, texts, tokenizer.encode)


def _in_bulk(tokenizer, texts, items, one) -> list[list[int]]:
    """`one(item)` of each; from one call on all `texts` (five times faster) where samples of it are the same."""
    batch = getattr(tokenizer, "encode_batch", None)
    inner = getattr(tokenizer, "inner", None)  # a tokenizers.Tokenizer
    if batch is None and hasattr(inner, "encode_batch_fast"):

        def batch(texts):
            return [encoding.ids for encoding in inner.encode_batch_fast(texts, add_special_tokens=False)]

    if batch is not None:
        all_ids = [list(ids) for ids in batch(texts)]
        if all(all_ids[i] == list(one(items[i])) for i in {0, len(items) // 2, len(items) - 1}):
            return all_ids
    return [list(one(item)) for item in items]
