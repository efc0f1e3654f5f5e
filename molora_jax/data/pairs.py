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
