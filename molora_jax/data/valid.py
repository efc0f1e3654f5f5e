"""`data.valid`: rows of files of their own are held out, beside tasks of which every row trains.

A row of it belongs to the training task of its name; one without a `task`, to the only training task where there is
one. Others make tasks that are evaluated only: these come after those that train.
"""

import dataclasses

import numpy as np

from molora_jax.data.encode import Task
from molora_jax.data.example import HELD_OUT
from molora_jax.data.packed import pack_texts


def join_valid(tasks: tuple[Task, ...], valid: tuple[Task, ...]) -> tuple[Task, ...]:
    """`tasks` with the rows of `valid`, all of them held out."""
    joined, places = list(tasks), {task.name: i for i, task in enumerate(tasks)}
    for task in valid:
        held = dataclasses.replace(task, split=np.full_like(task.split, HELD_OUT))
        at = places.get(task.name, 0 if len(tasks) == 1 and task.unnamed else None)
        if at is None:
            places[task.name] = len(joined)
            joined.append(held)
        else:
            joined[at] = _join(joined[at], held)
    return tuple(joined)


def _join(task: Task, held: Task) -> Task:
    texts = [text for text, split in zip(task.texts, task.split.tolist(), strict=True) if split != HELD_OUT]
    train = {(prompt, target) for prompt, target, *_ in texts}
    also = task.also_trained + sum((prompt, target) in train for prompt, target, *_ in held.texts)
    dropped, unused = dict(task.dropped), dict(task.unused)
    for total, counts in ((dropped, held.dropped), (unused, held.unused)):
        for name, count in counts.items():
            total[name] = total.get(name, 0) + count
    together = {
        name: np.concatenate([getattr(task, name), getattr(held, name)])
        for name in ("ids", "mask", "context", "lead", "split")
    }
    packed, at = pack_texts([*task.texts, *held.texts])
    return dataclasses.replace(
        task, **together, offsets=np.concatenate([task.offsets, task.offsets[-1] + held.offsets[1:]]),
        packed_texts=packed, texts_at=at, dropped=dropped, unused=unused,
        also_trained=also, asked=(task.asked[0] or held.asked[0], task.asked[1] + held.asked[1]),
    )  # fmt: skip
