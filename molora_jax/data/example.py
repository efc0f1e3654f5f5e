"""An example, its split, and the seeded order that replaces a shuffle.

Splits are a function of the text alone: sha256(task + "\\0" + group) gives a place in 0 .. 1; the last
`data.test_share` of it is test, as much before that valid, the rest train (0.05: 90 / 5 / 5). The group is whatever
ties variants of one item together (a lemma, a country, an emoji), so no item straddles two splits, and adding rows
elsewhere moves none.

Orders come from a 64-bit mixing function written here, not from a library's generator, so that the order of a run does
not change with the version of numpy.
"""

import dataclasses
import hashlib
import json

import numpy as np

SPLITS = ("train", "valid", "test")
HELD_OUT = 3  # a split of Task.split: in valid and in test


@dataclasses.dataclass(frozen=True)
class Example:
    """One row of data: a question with its answer.

    task: the task's reported name. prompt: what is asked (of a chat: all turns before the answer, as text).
    target: the answer. group: the key of the split. choices: all labels of a classification task, else None.
    turns: the conversation as the chat template takes it (`role`, `content`, and `tool_calls`, `reasoning_content`,
      `name`, ... as given), the answer last; None: a user's turn with the prompt, then the answer.
    tools: for the template. weights: one a turn, 0 or 1; None: `data.train_on` decides.
    text: under `data.raw` the plain text, which ends with `target`; no template.
    row: the row of its file, from 1; 0: not from a file. rejected: of a pair, the same question with the other answer.
    offered: of a multiple choice, all answers that the row offers; the target is one of them.
    """

    task: str
    prompt: str
    target: str
    group: str
    choices: tuple[str, ...] | None = None
    turns: tuple[dict, ...] | None = None
    tools: tuple[dict, ...] | None = None
    weights: tuple[float, ...] | None = None
    text: str | None = None
    row: int = 0
    rejected: "Example | None" = None
    offered: tuple[str, ...] | None = None

    @property
    def tie(self) -> bool:
        """Whether the answers of a pair are the same."""
        other = self.rejected
        return other is not None and (self.target, self.turns, self.text) == (other.target, other.turns, other.text)

    def conversation(self) -> list[dict]:
        """The turns, the answer last."""
        plain = {"role": "user", "content": self.prompt}, {"role": "assistant", "content": self.target}
        return [dict(turn) for turn in self.turns or plain]

    def with_answer(self, answer: str) -> "Example":
        """The same question with another answer, in turns or as plain text."""
        turns = self.turns and (*self.turns[:-1], {"role": "assistant", "content": answer})
        text = None if self.text is None else self.prompt + answer
        return dataclasses.replace(self, target=answer, turns=turns, text=text, offered=None, weights=None)

    @property
    def more(self) -> list | None:
        """What prompt and target do not tell, as JSON values; None where they tell it all."""
        plain = all(
            turn.keys() == {"role", "content"} and isinstance(turn["content"], str) for turn in self.turns or ()
        )
        if plain and self.tools is None and self.weights is None and self.text is None and self.rejected is None:
            return None
        own = [self.turns, self.tools, self.weights, self.text]
        return own if self.rejected is None else [*own, self.rejected.target, self.rejected.more]


@dataclasses.dataclass(frozen=True)
class Encoded:
    """An example as ids: `context_ids` end where the model starts to answer, `target_ids` end with the end token.

    `loss_mask`: 1 for each of them that is trained on. `example_id` is unique within the split and is what batches
    carry in `example_ids`. Of a labelled text the one target id is the number of its class.
    """

    task: str
    task_id: int
    split: str
    example_id: int
    prompt: str
    target: str
    group: str
    choices: tuple[str, ...] | None
    context_ids: tuple[int, ...]
    target_ids: tuple[int, ...]
    loss_mask: tuple[int, ...]
    rejected: "Encoded | None" = None  # of a pair: the same question with the other answer
    offered: "tuple[Example, ...] | None" = None  # of a multiple choice: the question with each of the answers

    @property
    def unit(self) -> "tuple[Encoded, ...]":
        """The examples of the consecutive rows that belong together, this one first."""
        return (self,) if self.rejected is None else (self, self.rejected)

    @property
    def ids(self) -> tuple[int, ...]:
        return self.context_ids + self.target_ids

    @property
    def num_targets(self) -> int:
        """How many tokens have a loss: the first one is never predicted."""
        return sum(self.loss_mask[1:])


def split_of(task: str, group: str, test_share: float = 0.05) -> int:
    """0, 1 or 2: the index in SPLITS."""
    number = int.from_bytes(hashlib.sha256(f"{task}\0{group}".encode()).digest(), "big")
    place = number % 100 * 10_000 + number // 100 % 10_000  # in millionths; the first two digits are the older ones
    left, held_out = 1_000_000 - place, round(test_share * 1_000_000)
    return 2 if left <= held_out else 1 if left <= 2 * held_out else 0


def distinct(examples, *, several_answers: bool = False):
    """Sorted examples without repeats, whatever order the source came in.

    One answer a question (the smallest) unless `several_answers`, where only equal pairs are repeats.
    """
    return list(unrepeated(sorted(examples, key=in_order), several_answers=several_answers))


def in_order(example: Example) -> tuple[str, str]:
    return example.prompt, example.target


def unrepeated(examples, *, several_answers: bool):
    """Those of sorted examples that are the first of their kind, one after another."""
    prompt, seen = None, set()
    for example in examples:
        if example.prompt != prompt:
            prompt, seen = example.prompt, set()
        parts = [example.turns, example.tools, example.weights, example.text]
        parts += [example.offered] if example.offered else []
        if example.rejected is not None:
            parts += [example.rejected.target, example.rejected.turns]
        more = json.dumps(parts, sort_keys=True) if any(part is not None for part in parts) else None
        kind = (example.target if several_answers else "", more)
        if kind not in seen:
            seen.add(kind)
            yield example


def seed_of(*key) -> int:
    """A 64-bit seed out of any printable key."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little")


def mixed(seed: int, count: int) -> np.ndarray:
    """`[count]` uint64: splitmix64 of `seed` at 0 .. count - 1 (Steele, Lea and Flood, 2014)."""
    with np.errstate(over="ignore"):
        z = np.uint64(seed) + (np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def shuffled(seed: int, count: int) -> np.ndarray:
    """A permutation `[count]` int64 that depends on `seed` and `count` only."""
    return np.argsort(mixed(seed, count), kind="stable")
