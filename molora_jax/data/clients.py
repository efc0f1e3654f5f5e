"""The rows of several clients: one data set divided, and a stream for each of them.

    task        client k has the tasks k, k + N, ...
    iid         every task's (every class's) examples dealt out evenly
    dirichlet   of every class a fraction p_k ~ Dirichlet(alpha) (Hsu, Qi, Brown 2019, arXiv 1909.06335)
    skew        of class c the client c mod N has the fraction `skew`, the others the rest in equal parts

The class of an example is its label, or its task where rows have none. A division is a function of the seed and the
examples. What belongs together (a pair) stays together. N clients, B rows, S sequence.
"""

import numpy as np

from molora_jax.data.example import mixed, seed_of, shuffled
from molora_jax.data.packing import empty_batch, write_segment
from molora_jax.data.prefetch import iterate
from molora_jax.data.split import Split
from molora_jax.data.stream import Stream
from molora_jax.errors import InputError

WAYS = ("task", "iid", "dirichlet", "skew")


def divide(
    split: Split, task_ids, clients: int, how: str, *, seed: int, alpha: float, skew: float, unit: int, labelled: bool
) -> list[np.ndarray]:  # fmt: skip
    """The ids of each client's examples (of a unit: its first), in order.

    Raises:
      InputError: a client without an example.
    """
    tasks = split.task_ids
    members = np.flatnonzero(np.isin(tasks, task_ids))[::unit]
    if how == "task":
        number = {task: i for i, task in enumerate(task_ids)}
        owner = np.array([number[int(t)] % clients for t in tasks[members]], np.int64)
    else:
        classes = np.array([split.tokens(i)[-1] for i in range(len(tasks))]) if labelled else tasks
        owner = np.empty(len(members), np.int64)
        rng = np.random.Generator(np.random.Philox(seed_of("clients", seed)))
        for c in np.unique(classes[members]).tolist():
            here = np.flatnonzero(classes[members] == c)
            here = here[shuffled(seed_of("clients", seed, int(c)), len(here))]
            if how == "dirichlet":
                fractions = rng.dirichlet(np.full(clients, alpha))
            elif how == "skew" and clients > 1:
                fractions = np.full(clients, (1 - skew) / (clients - 1))
                fractions[int(c) % clients] = skew
            else:
                fractions = np.full(clients, 1 / clients)
            ends = np.round(np.cumsum(fractions) * len(here)).astype(np.int64)
            owner[here] = np.searchsorted(ends, np.arange(len(here)), side="right").clip(max=clients - 1)
    found = [members[owner == k] for k in range(clients)]
    for k, ids in enumerate(found):
        if not len(ids):
            raise InputError(
                "regime.split", got=f"{how!r}, which leaves client {k} of {clients} without an example",
                expected="data for every client",
                fix="Take fewer clients, a larger regime.alpha, another seed, or regime.split='iid'.",
            )  # fmt: skip
    return found


class Clients:
    """`sizes [N]`: examples of each client; `parts`: a stream of each. A batch is `[N, B, S]`."""

    def __init__(self, parts: list):
        self.parts, self.sizes = parts, [part.size for part in parts]
        self.targets_per_row = parts[0].targets_per_row

    def batch(self, turn: int, rows=None) -> dict[str, np.ndarray]:
        each = [part.batch(turn, rows) for part in self.parts]
        return {name: np.stack([batch[name] for batch in each]) for name in each[0]}

    def iterate(self, start: int = 0, rows=None, prefetch: int = 2):
        return iterate(self, start, rows=rows, prefetch=prefetch)


def packed(stream: Stream, ids: np.ndarray, seed: int):
    """A client's packed rows."""
    return stream.among({int(t): ids[stream.split.task_ids[ids] == t] for t in np.unique(stream.split.task_ids[ids])},
                        seed=seed)  # fmt: skip


class Drawn:
    """A Poisson sample a turn: every example is drawn with probability `rate`, on its own; one example a row.

    places: rows of a batch; what a sample has more is left out (`accountant.most_drawn` makes that as good as never
    happen), and rows that it does not need hold no token.
    """

    def __init__(self, stream: Stream, ids: np.ndarray, *, rate: float, places: int, seed: int):
        self.split, self.ids, self.size = stream.split, ids, len(ids)
        self.seq_len, self.pad_id, self.targets_per_row = stream.seq_len, stream.pad_id, stream.targets_per_row
        self.rate, self.places, self.seed = rate, places, seed

    def drawn(self, turn: int) -> np.ndarray:
        places = mixed(seed_of("poisson", self.seed, turn), self.size) / 2.0**64
        return self.ids[places < self.rate]

    def batch(self, turn: int, rows=None) -> dict[str, np.ndarray]:
        batch = empty_batch(self.places, self.seq_len, pad_id=self.pad_id)
        for row, example in enumerate(self.drawn(turn)[: self.places].tolist()):
            write_segment(
                batch, row, 0, 1, ids=self.split.tokens(example), mask=self.split.loss_mask(example),
                task_id=int(self.split.task_ids[example]), example_id=example,
            )  # fmt: skip
        return batch if rows is None else {name: value[rows] for name, value in batch.items()}
