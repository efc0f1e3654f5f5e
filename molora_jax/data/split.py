"""One split of all tasks as flat arrays, with every example within `seq_len`.

An example of n tokens takes n - 1 positions (the end token is never an input). `data.overlong` decides what becomes of
one that takes more than `seq_len`: "skip" drops it, unless it fits without what the template puts between the prompt
and the answer's text (an empty think block, say), which is then cut; "truncate" cuts it from the left (of a
conversation at least one token before the last answer stays, and an answer that does not fit even so is dropped);
"error" refuses. An example with nothing left to train on is dropped too. What was dropped or cut is counted.
"""

import dataclasses

import numpy as np

from molora_jax.data.encode import Task
from molora_jax.data.example import HELD_OUT, SPLITS, Encoded, Example
from molora_jax.errors import InputError

AT_ONCE = 50_000  # examples whose masks are counted together


@dataclasses.dataclass(frozen=True)
class Split:
    """N examples; an example's id is its index.

    start, length: [N] int64, where the tokens of an example lie in its task's `ids` and `mask`. context: [N] int64, how
    many of them stand before the last answer. targets: [N] int64, how many have a loss (the first token has none).
    positions: length - 1. task_ids: [N] int32. rows: [N] int64, the index within its task, for its texts.
    """

    name: str
    tasks: tuple[Task, ...]
    start: np.ndarray
    length: np.ndarray
    context: np.ndarray
    targets: np.ndarray
    task_ids: np.ndarray
    rows: np.ndarray
    counts: dict[str, dict[str, int]]  # task -> skipped, truncated

    @property
    def positions(self) -> np.ndarray:
        return self.length - 1

    def tokens(self, example_id: int) -> np.ndarray:
        return self._task(example_id).ids[self._where(example_id)]

    def loss_mask(self, example_id: int) -> np.ndarray:
        return self._task(example_id).mask[self._where(example_id)]

    def _task(self, example_id: int) -> Task:
        return self.tasks[int(self.task_ids[example_id])]

    def _where(self, example_id: int) -> slice:
        begin = self.start[example_id]
        return slice(begin, begin + self.length[example_id])

    def largest(self, name: str, unit: int) -> np.ndarray:
        """`positions` or `targets` `[N]`, of an example and of the `unit - 1` after it that belong to it."""
        values = getattr(self, name)
        for _ in range(unit - 1):
            values = np.maximum(values, np.append(values[1:], 0))
        return values

    def example(self, example_id: int) -> Encoded:
        task = self._task(example_id)
        encoded = self._text(example_id)
        return encoded if task.unit == 1 else dataclasses.replace(encoded, rejected=self._text(example_id + 1))

    def _text(self, example_id: int) -> Encoded:
        task_id = int(self.task_ids[example_id])
        task = self.tasks[task_id]
        prompt, target, group, *choice = task.texts[int(self.rows[example_id])]
        ids = self.tokens(example_id).tolist()
        cut = int(self.context[example_id])
        return Encoded(
            task=task.name,
            task_id=task_id,
            split=self.name,
            example_id=int(example_id),
            prompt=prompt,
            target=target,
            group=group,
            choices=task.choices,
            context_ids=tuple(ids[:cut]),
            target_ids=tuple(ids[cut:]),
            loss_mask=tuple(self.loss_mask(example_id).tolist()),
            offered=_offered(task.name, prompt, target, group, *choice[0]) if choice else None,
        )


def _offered(task, prompt, target, group, offered, turns, tools, text) -> tuple[Example, ...]:
    """A multiple choice's question with each of its answers."""
    turns, tools = (None if many is None else tuple(many) for many in (turns, tools))
    asked = Example(task, prompt, target, group, turns=turns, tools=tools, text=text)
    return tuple(asked.with_answer(answer) for answer in offered)


def shorten(task: Task, *, seq_len: int, overlong: str) -> tuple[Task, np.ndarray]:
    """The task, and which of its examples (`[N]` bool) lost what the template puts before the answer's text."""
    length = np.diff(task.offsets)
    cut = (length - 1 > seq_len) & (length - 1 - task.lead <= seq_len) & (overlong == "skip")
    cut = _together(cut, task.unit)
    if not cut.any():
        return task, cut
    keep = np.ones(len(task.ids), bool)
    for i in np.flatnonzero(cut):
        begin = task.offsets[i] + task.context[i]
        keep[begin : begin + task.lead[i]] = False
    offsets = np.concatenate([[0], np.cumsum(length - np.where(cut, task.lead, 0))])
    return dataclasses.replace(task, ids=task.ids[keep], mask=task.mask[keep], offsets=offsets), cut


def make_splits(tasks: tuple[Task, ...], *, seq_len: int, overlong: str) -> dict[str, Split]:
    """The splits of all tasks, by name.

    Raises:
      InputError: an over-long example under `overlong="error"`.
    """
    tasks, cut = zip(*(shorten(task, seq_len=seq_len, overlong=overlong) for task in tasks), strict=True)
    return {name: make_split(name, tasks, cut, seq_len=seq_len, overlong=overlong) for name in SPLITS}


def make_split(name: str, tasks: tuple[Task, ...], shortened, *, seq_len: int, overlong: str) -> Split:
    """`shortened`: of each task, as from `shorten`."""
    parts, counts = [], {}
    for task_id, task in enumerate(tasks):
        rows = np.flatnonzero((task.split == SPLITS.index(name)) | ((task.split == HELD_OUT) & (name != "train")))
        start, length = task.offsets[rows], (task.offsets[1:] - task.offsets[:-1])[rows]
        # plain text (context 0) may be cut anywhere: its first token is what stands before the answer
        answer = np.where(task.context[rows] > 0, length - task.context[rows], 1)
        context = np.maximum(task.context[rows], 1)
        long = length - 1 > seq_len
        if overlong == "error" and long.any():
            row = int(rows[np.argmax(long)])
            raise InputError(
                f"data.tasks, task {task.name!r}, item of group {task.texts[row][2][:60]!r}",
                got=f"{int(length[np.argmax(long)]) - 1} positions",
                expected=f"at most data.seq_len={seq_len}",
                fix='Raise `data.seq_len`, or set `data.overlong` to "skip" or "truncate".',
            )
        drop = long if overlong == "skip" else answer > seq_len
        drop = _together(drop, task.unit)
        cut = np.where(drop, 0, _together(np.maximum(length - 1 - seq_len, 0), task.unit))
        context = np.maximum(context - cut, 1)
        targets = _trained(task.mask, start + cut + 1, start + length)
        drop = _together(drop | (targets == 0), task.unit)
        cut = np.where(drop, 0, cut)
        counts[task.name] = dict(
            skipped=int(drop.sum()) // task.unit,
            truncated=int(((cut > 0) | (shortened[task_id][rows] & ~drop)).sum()) // task.unit,
        )
        columns = (start + cut, length - cut, context, targets, np.full(len(rows), task_id), rows)
        parts.append([column[~drop] for column in columns])
    start, length, context, targets, task_ids, rows = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Split(name, tasks, start, length, context, targets, task_ids.astype(np.int32), rows, counts)


def _trained(mask: np.ndarray, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
    """How many ids are trained on from each `begin` to before `end`; both rise. Some million ids are held at once."""
    out = np.zeros(len(begin), np.int64)
    for first in range(0, len(begin), AT_ONCE):
        some = slice(first, first + AT_ONCE)
        low, high = int(begin[some][0]), int(end[some][-1])
        counts = np.concatenate([[0], np.cumsum(mask[low:high], dtype=np.int64)])
        out[some] = counts[end[some] - low] - counts[begin[some] - low]
    return out


def _together(values: np.ndarray, unit: int) -> np.ndarray:
    """`[N]`: the largest of each `unit` consecutive entries, in all of their places."""
    return values if unit == 1 else values.reshape(-1, unit).max(axis=1).repeat(unit)
