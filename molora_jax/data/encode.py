"""From examples to ids: one `Task` of flat arrays per entry of `data.tasks`.

The context of an example is the model's own chat template around its turns, with the generation prompt at the end;
each is rendered (a template may depend on its text). The target is the bare answer and the end token; the loss is on
the target only. Lengths are not limited here: `split.py` applies `data.seq_len` and `data.overlong`.
"""

import dataclasses
import functools
import hashlib
import pathlib

import numpy as np

from molora_jax.data import cache, jsonl, packages
from molora_jax.data.example import distinct, split_of
from molora_jax.data.sources import SOURCES
from molora_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Task:
    """All examples of one entry, N of them, in a deterministic order.

    ids: [sum of lengths] int32, context and target of each example one after another.
    offsets: [N + 1] int64 into `ids`. context: [N] int32 lengths of the contexts. split: [N] uint8.
    content: digest of the examples as text. texts: JSON of [prompt, target, group], decoded only when asked for.
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
    packed_texts: np.ndarray

    @functools.cached_property
    def texts(self) -> list:
        return cache.unpack_json(self.packed_texts)


def load_task(entry: str, *, tokenizer, digest: str | None, system: str, bad_rows: str) -> Task:
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
    key = hashlib.sha256(repr((_own_code(), source, digest, system)).encode()).hexdigest()[:32]
    arrays = cache.load(key) if digest else None
    if arrays is None:
        arrays = _encode(*read(), tokenizer=tokenizer, system=system, entry=entry)
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
        content=hashlib.sha256(arrays["texts"].tobytes()).hexdigest(),
        **{field: arrays[field] for field in ("ids", "offsets", "context", "split")},
    )


def identity(entry: str) -> str:
    """What the examples of a task depend on beside files: code and package versions."""
    module = SOURCES[entry]
    more = getattr(module, "identity", str)()
    return f"{entry} {module.FILTERS} {module.DISTRIBUTION} {packages.version(module.DISTRIBUTION)} {more}".strip()


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


def _encode(name, split_key, examples, dropped, *, tokenizer, system, entry) -> dict[str, np.ndarray]:
    if tokenizer.eos_id is None:
        raise InputError(
            "base.source",
            got="a tokenizer without an end token",
            expected="one whose answers can end",
            fix="Name an eos_token in its tokenizer_config.json.",
        )
    chats = [_turns(example, system) for example in examples]
    contexts = _encode_chats(tokenizer, chats)
    targets = _encode_texts(tokenizer, [example.target for example in examples])
    end = [tokenizer.eos_id]
    flat, lengths = [], []
    for context, target in zip(contexts, targets, strict=True):
        flat += context
        flat += target
        flat += end
        lengths.append(len(context) + len(target) + 1)
    ids = np.asarray(flat, np.int32)
    if ids.min() < 0 or ids.max() >= tokenizer.vocab_size:
        raise InputError(
            f"data.tasks, {entry}",
            got=f"token ids from {ids.min()} to {ids.max()}",
            expected=f"ids below the vocabulary size {tokenizer.vocab_size}",
            fix="The tokenizer and the model do not belong together.",
        )
    texts = [[example.prompt, example.target, example.group] for example in examples]
    meta = dict(name=name, choices=examples[0].choices, dropped=dropped)
    return dict(
        ids=ids,
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        context=np.asarray([len(context) for context in contexts], np.int32),
        split=np.asarray([split_of(split_key, example.group) for example in examples], np.uint8),
        texts=cache.pack_json(texts),
        meta=cache.pack_json(meta),
    )


def _turns(example, system: str) -> list[dict[str, str]]:
    turns = example.messages or (("user", example.prompt),)
    if system and turns[0][0] != "system":
        turns = (("system", system), *turns)
    return [{"role": role, "content": text} for role, text in turns]


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
