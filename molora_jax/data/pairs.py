"""Pairs of a chosen and a rejected answer, made from the tasks that packages ship.

The chosen answer is the task's own. The rejected one is another class where the task has classes, else the answer to
another question of the same group: another form of the same word.
"""

import dataclasses

from molora_jax.data.example import Example, seed_of
from molora_jax.errors import InputError

BY_GROUP = ("morph",)  # tasks whose groups hold answers of one kind, right for one question and wrong for another


def of_task(entry: str, examples: list[Example]) -> list[Example]:
    """The examples that have a rejected answer, each with it; which one depends on the question alone.

    Raises:
      InputError: a task without wrong answers of its own.
    """
    by_group: dict[str, set] = {}
    for example in examples:
        by_group.setdefault(example.group, set()).add(example.target)
    out = []
    for example in examples:
        if example.choices is not None:
            others = [label for label in example.choices if label != example.target]
        elif entry in BY_GROUP:
            others = sorted(by_group[example.group] - {example.target})
        else:
            raise InputError(
                f"data.tasks, task {entry!r}", got="a task without wrong answers",
                expected=f"a task with classes, {', '.join(BY_GROUP)}, or a file of prompt, chosen, rejected",
                fix="Choose another task, or another objective.",
            )  # fmt: skip
        if others:
            wrong = others[seed_of("rejected", example.prompt) % len(others)]
            out.append(dataclasses.replace(example, rejected=dataclasses.replace(example, target=wrong)))
    return out


def of_ranking(prompt: str, answers, ranks) -> list[dict]:
    """Rows `prompt, chosen, rejected` of every pair of ranked answers; rank 1 is the best, equal ranks say nothing.

    >>> [(row["chosen"], row["rejected"]) for row in of_ranking("?", ["a", "b", "c"], [2, 1, 2])]
    [('b', 'a'), ('b', 'c')]
    """
    both = [(i, j) for i in range(len(answers)) for j in range(i + 1, len(answers)) if ranks[i] != ranks[j]]
    ordered = [(i, j) if ranks[i] < ranks[j] else (j, i) for i, j in both]
    return [dict(prompt=prompt, chosen=answers[i], rejected=answers[j]) for i, j in ordered]


def judged(rows, judge) -> list[dict]:
    """Rows `prompt, chosen, rejected` of those pairs on which a judge agrees with itself when the answers are swapped.

    Args:
      rows: `(prompt, one, other)`. judge: `(prompt, first, second) -> 1 or 2`, the better answer's place.

    >>> judged([("?", "a", "b")], lambda prompt, first, second: 1)  # a judge that always takes the first
    []
    """
    out = []
    for prompt, one, other in rows:
        first, swapped = judge(prompt, one, other), judge(prompt, other, one)
        if {first, swapped} == {1, 2}:
            out += of_ranking(prompt, (one, other), (1, 2) if first == 1 else (2, 1))
    return out
