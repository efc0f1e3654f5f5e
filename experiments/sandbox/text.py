"""From documents to rows: a byte-level BPE of our own, and pieces of a document that fill a row each.

A piece has at most `LENGTH` tokens and ends before a word, so that its text by itself becomes the tokens that it has
inside the document. Rows are plain text (`data.raw`), a task a source.
"""

import json
import pathlib

import numpy as np
import tokenizers

from molora_jax.io.tokenizer import Tokenizer

LENGTH = 256  # tokens of a row; with the end token it has 257, of which 256 are predicted from those before
END = "<|end|>"
VOCABULARY = 4096


def trained_tokenizer(texts, vocabulary: int | None = None) -> Tokenizer:
    """Byte-level BPE (every text has a code) with one special token, the end. Digits stand alone."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.Digits(individual_digits=True),
         tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )  # fmt: skip
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary or VOCABULARY, special_tokens=[END], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    inner.train_from_iterator(texts, trainer=trainer)
    return as_tokenizer(inner)


def as_tokenizer(inner) -> Tokenizer:
    return Tokenizer(inner, eos=END, pad=END, add_bos=False)


def pieces(text: str, tokenizer: Tokenizer, length: int = LENGTH) -> list[str]:
    """A document's text, cut before words into pieces of at most `length` tokens."""
    encoded = tokenizer.inner.encode(text, add_special_tokens=False)
    starts = [first for first, _ in encoded.offsets] + [len(text)]
    free = np.array([text[at : at + 1].isspace() and not text[at - 1].isspace() for at in starts[:-1]] + [True])
    out, first = [], 0
    while first < len(starts) - 1:
        last = min(first + length, len(starts) - 1)
        while last > first + 1 and not free[last]:
            last -= 1
        out.append(text[starts[first] : starts[last]])
        first = last
    return [piece for piece in out if piece.strip()]


def write_rows(found: dict, tokenizer: Tokenizer, folder) -> dict[str, str]:
    """`{"train": entries of data.tasks, "valid": of data.valid}`, a file of rows a source and split."""
    folder = pathlib.Path(folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    entries = {"train": [], "valid": []}
    for source, docs in found.items():
        for split, wanted in (("train", False), ("valid", True)):
            rows = [piece for _, text, held in docs if held == wanted for piece in pieces(text, tokenizer)]
            path = folder / f"{source}.{split}.jsonl"
            text = "".join(json.dumps({"task": source, "text": piece}) + "\n" for piece in rows)
            path.write_text(text, encoding="utf-8")
            entries[split] += [f"jsonl:{path}"] * bool(rows)
    return {split: ",".join(files) for split, files in entries.items()}


def rows(entries: str):
    """The texts of `write_rows`, file by file."""
    for entry in entries.split(","):
        for line in pathlib.Path(entry.removeprefix("jsonl:")).read_text(encoding="utf-8").splitlines():
            yield json.loads(line)["text"]


def write_heldout(entries: str, tokenizer: Tokenizer, path, *, each: int = 20, length: int = 120):
    """A few held-out rows of every source, short ones: what the leaderboard measures forgetting on."""
    lines = []
    for entry in entries.split(","):
        every = list(rows(entry))
        for row in every[:: max(1, len(every) // each)][:each]:
            lines.append(json.dumps({"text": pieces(row, tokenizer, length)[0]}) + "\n")
    pathlib.Path(path).write_text("".join(lines), encoding="utf-8")
