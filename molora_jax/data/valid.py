"""`data.valid`: rows of a file of their own are held out, beside tasks of which every row trains.

A row of it belongs to the training task of its name; one without a `task`, to the only training task where there is
one. Others make tasks that are evaluated only: these come after those that train.
"""

import dataclasses

import numpy as np

from molora_jax.data import cache
from molora_jax.data.encode import Task
from molora_jax.data.example import HELD_OUT


def join_valid(tasks: tuple[Task, ...], valid: tuple[Task, ...]) -> tuple[Task, ...]:
    """`tasks` with the rows of `valid`, all of them held out."""
    joined, more, names = list(tasks), [], {task.name: i for i, task in enumerate(tasks)}
    for task in valid:
        held = dataclasses.replace(task, split=np.full_like(task.split, HELD_OUT))
        at = names.get(task.name, 0 if len(tasks) == 1 and task.unnamed else None)
        if at is None:
            more.append(held)
        else:
            joined[at] = _join(joined[at], held)
    return (*joined, *more)


def _join(task: Task, held: Task) -> Task:
    train = {(prompt, target) for prompt, target, _ in task.texts}
    also = sum((prompt, target) in train for prompt, target, _ in held.texts)
    dropped, unused = dict(task.dropped), dict(task.unused)
    for total, counts in ((dropped, held.dropped), (unused, held.unused)):
        for name, count in counts.items():
            total[name] = total.get(name, 0) + count
    together = {
        name: np.concatenate([getattr(task, name), getattr(held, name)])
        for name in ("ids", "mask", "context", "lead", "split")
    }
    return dataclasses.replace(
        task, **together, offsets=np.concatenate([task.offsets, task.offsets[-1] + held.offsets[1:]]),
        packed_texts=cache.pack_json(task.texts + held.texts), dropped=dropped, unused=unused,
        also_trained=also,
    )  # fmt: skip
