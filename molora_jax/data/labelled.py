"""Rows with a class or with two answers as ids.

A labelled text is its ids (with what the tokenizer puts around a text of its own), and behind them, as the one target,
the number of its class: so packing, splits and batches are those of any other example.
"""

import dataclasses

from molora_jax.data.example import Example
from molora_jax.data.render import CHUNK, LONGEST, Ids, Refused


def encode(tokenizer, examples: list[Example], labels: list[str]) -> list[Ids | Refused]:
    """An entry for each example, in order; `labels` are the classes, by number."""
    numbers, out = {label: i for i, label in enumerate(labels)}, []
    for first in range(0, len(examples), CHUNK):
        chunk = examples[first : first + CHUNK]
        texts = [example.prompt if len(example.prompt) <= LONGEST else "" for example in chunk]
        for example, text, (ids, _) in zip(chunk, texts, tokenizer.encode_spans(texts), strict=True):
            if not text:
                out.append(Refused(f"{len(example.prompt):,} characters", f"at most {LONGEST:,}", "Cut the row."))
                continue
            whole = [*tokenizer.with_prefix(ids), *tokenizer.suffix_ids]
            if not ids:
                out.append(Refused("a text without a token", "some text"))
                continue
            out.append(Ids([*whole, numbers[example.target]], [0] * len(whole) + [1], len(whole)))
    return out


@dataclasses.dataclass(frozen=True)
class Both:
    """The two answers to one question."""

    chosen: Ids
    rejected: Ids

    @property
    def untraced(self) -> tuple[tuple[str, str], ...]:
        return tuple(dict.fromkeys((*self.chosen.untraced, *self.rejected.untraced)))

    @property
    def asked(self) -> str:
        return self.chosen.asked or self.rejected.asked


def both(chosen: Ids | Refused, rejected: Ids | Refused) -> Both | Refused:
    refused = [side for side in (chosen, rejected) if isinstance(side, Refused)]
    return max(refused, key=lambda side: side.died) if refused else Both(chosen, rejected)
