"""The training stream: batch `step` is a function of (data, config, seed, step), whatever was asked for before.

**Windows.** The endless sequence of packed rows is planned in windows of about 4,096 examples; global row
`step * batch_size + b` lies in the window whose rows include it, so a batch may end one window and start the next, and
no row is left out. A window is one epoch when all tasks together have no more examples than that. To find a row far
ahead, the windows before it are planned once for their row counts (10 to 40 ms each); the plan needs lengths only.

**Mixture.** Of every window, task i gets the fraction p_i ~ n_i ** (1 / temperature) of the draws, counted so that no
rounding error grows: after w windows exactly floor(w * draws * p_i) examples of it have been used.

**Epochs of a task.** A task's examples are used in the order of one permutation after another, each over all of its
examples. So after c draws every example has been used floor(c / n_i) or that plus one times. Small tasks go through
their data several times while a large one goes through it once. With a single task windows are cut at the epoch's end.
Within a window the rows are in random order.
"""

import bisect
import collections
import operator
import threading

import numpy as np

from molora_jax.config.resolve import split_commas
from molora_jax.data.example import seed_of, shuffled
from molora_jax.data.packing import empty_batch, pack, write_segment
from molora_jax.data.split import Split
from molora_jax.errors import InputError

WINDOW = 4096  # examples: enough for a tight packing, little enough for a start at once
_ONE = 1 << 20  # fixed-point 1 for the fractions


class Stream:
    """See the module. `targets_per_row` and `max_segments` are static bounds that every row keeps.

    With `unit` above 1 so many consecutive examples belong together: row `unit * i + k` holds the k-th of each unit
    that row `unit * i` holds the first of, in the same segments. The plan is of units, by their largest members.
    """

    def __init__(
        self,
        split: Split,
        *,
        task_ids: tuple[int, ...],
        seq_len: int,
        batch_size: int,
        seed: int,
        temperature: float,
        targets_per_row: int,
        max_segments: int,
        pad_id: int,
        unit: int = 1,
        only: dict[int, np.ndarray] | None = None,
        fractions: dict[int, float] | None = None,
    ):
        """`only`: of each task the examples that take part (of a unit: its first), by default all; `fractions`: of the
        draws, by task, in place of those that the temperature gives."""
        self.split, self.task_ids, self.seed, self.temperature = split, task_ids, seed, temperature
        self.seq_len, self.batch_size, self.pad_id = seq_len, batch_size, pad_id
        self.targets_per_row, self.max_segments = targets_per_row, max_segments
        self.unit, self._size = unit, {name: split.largest(name, unit) for name in ("positions", "targets")}
        every = {i: np.flatnonzero(split.task_ids == i)[::unit] for i in task_ids}  # the first of each unit
        self._members = every if only is None else {i: only[i] for i in task_ids}
        for i, members in self._members.items():
            if not len(members):
                raise InputError(
                    f"data.tasks, task {split.tasks[i].name!r}",
                    got="no training example that fits",
                    expected=f"at least one of at most data.seq_len={seq_len} positions",
                    fix="Add rows, raise `data.seq_len`, or take the task out (`data.file_tasks=False` makes a file "
                    "one task, `data.test_share=0.0` holds no row out).",
                )
        sizes = np.array([len(members) for members in self._members.values()], np.float64)
        weights = sizes ** (1.0 / temperature)
        self.fractions = fractions
        if fractions is None:
            self.fractions = dict(zip(task_ids, (weights / weights.sum()).tolist(), strict=True))
        self._fixed = {i: max(1, round(fraction * _ONE)) for i, fraction in self.fractions.items()}
        self.size = self._total = int(sizes.sum())
        self._per_total = -(-self._total // WINDOW)
        self._ends = []  # rows in windows 0 .. w, for all w planned so far
        self._plans = collections.OrderedDict()
        self._orders = {}
        self._lock = threading.RLock()  # readers are prefetching threads

    def batch(self, step: int, rows=None) -> dict[str, np.ndarray]:
        """The global batch of `step`, or its `rows` (a slice, or an array of row numbers), as arrays `[B, S]`.

        int32 `tokens, targets, segment_ids` (0 = pad)`, positions, task_ids, example_ids`, float32 `loss_weight`.
        """
        step = operator.index(step)
        if step < 0:
            raise ValueError(f"step {step} is negative")
        chosen = np.arange(self.batch_size)[slice(None) if rows is None else rows]
        batch = empty_batch(len(chosen), self.seq_len, pad_id=self.pad_id)
        for row, number in enumerate(chosen.tolist()):
            at = 0
            row_of_units, member = divmod(step * self.batch_size + number, self.unit)
            for segment, first in enumerate(self.row(row_of_units), start=1):
                example_id = first + member
                at = write_segment(
                    batch,
                    row,
                    at,
                    segment,
                    ids=self.split.tokens(example_id),
                    mask=self.split.loss_mask(example_id),
                    task_id=int(self.split.task_ids[example_id]),
                    example_id=example_id,
                )
        return batch

    def iterate(self, start_step: int = 0, rows=None, prefetch: int = 2):
        """Yields (step, batch) from `start_step` on, for ever, made ahead by `prefetch` threads (0: none).

        A failure in a thread is raised here at its step.
        """
        from molora_jax.data.prefetch import iterate

        return iterate(self, start_step, rows=rows, prefetch=prefetch)

    def for_tasks(self, tasks: str) -> "Stream":
        """The same kind of stream over some of the tasks, `"a,b"` (names, or entries of `data.tasks`, which may be
        several tasks); "" is all.

        Raises:
          InputError: an unknown task.
        """
        ids_of: dict[str, set] = {}
        for i in self.task_ids:
            for name in {self.split.tasks[i].entry, self.split.tasks[i].name}:
                ids_of.setdefault(name, set()).add(i)
        wanted = split_commas(tasks) or list(ids_of)
        for name in wanted:
            if name not in ids_of:
                raise InputError(
                    "schedule.*.tasks", got=repr(name), expected=f"some of {', '.join(ids_of)}", fix="Correct the name."
                )
        return Stream(
            self.split,
            task_ids=tuple(sorted(set().union(*(ids_of[name] for name in wanted)))),
            seq_len=self.seq_len,
            batch_size=self.batch_size,
            seed=self.seed,
            temperature=self.temperature,
            targets_per_row=self.targets_per_row,
            max_segments=self.max_segments,
            pad_id=self.pad_id,
            unit=self.unit,
        )

    def among(self, only: dict[int, np.ndarray], *, seed: int | None = None, fractions=None) -> "Stream":
        """The same kind of stream over some examples of some tasks, `{task id: ids}`; see `__init__`."""
        return Stream(
            self.split, task_ids=tuple(sorted(only)), seq_len=self.seq_len, batch_size=self.batch_size,
            seed=self.seed if seed is None else seed, temperature=self.temperature,
            targets_per_row=self.targets_per_row, max_segments=self.max_segments, pad_id=self.pad_id, unit=self.unit,
            only=only, fractions=fractions,
        )  # fmt: skip

    def part(self, low: int, high: int) -> "Stream":
        """The same kind of stream over the examples whose prompt has a hash from `low` to below `high` percent.

        A function of the prompt alone, so that no prompt, with whatever answers, is in two parts.

        Raises:
          InputError: a task without such an example.
        """
        only = {}
        for i, members in self._members.items():
            texts, rows = self.split.tasks[i].texts, self.split.rows
            place = np.array([seed_of("part", texts[rows[m]][0]) % 100 for m in members.tolist()])
            only[i] = members[(low <= place) & (place < high)]
        return self.among(only)

    def members(self, task_id: int) -> np.ndarray:
        """The ids of a task's examples (of a unit: its first)."""
        return self._members[task_id]

    def epoch_rows(self) -> int:
        """Rows that hold as many draws as all tasks together have examples."""
        return self.unit * sum(len(self.plan(window)) for window in range(self._per_total))

    def epoch_steps(self) -> int:
        """Steps of an epoch, rounded up; of many windows, by the rows of the first."""
        rows = self.epoch_rows() if self._per_total <= 4 else self.unit * len(self.plan(0)) * self._per_total
        return -(-rows // self.batch_size)

    def row(self, number: int) -> list[int]:
        """The example ids of one row of the endless sequence of rows (of units: the first of each)."""
        with self._lock:
            if len(self.task_ids) == 1 and self._per_total == 1:  # each window is the whole task: as many rows
                window, number = divmod(number, len(self.plan(0)))
                return self.plan(window)[number]
            while not self._ends or self._ends[-1] <= number:
                window = len(self._ends)
                self._ends.append((self._ends[-1] if self._ends else 0) + len(self.plan(window)))
            window = bisect.bisect_right(self._ends, number)
            return self.plan(window)[number - (self._ends[window - 1] if window else 0)]

    def plan(self, window: int) -> list[list[int]]:
        """The rows of one window, as lists of example ids: a function of (seed, window, lengths)."""
        with self._lock:
            if window not in self._plans:
                drawn = self.draws(window)
                rows = pack(
                    self._size["positions"][drawn],
                    self._size["targets"][drawn],
                    seq_len=self.seq_len,
                    targets_per_row=self.targets_per_row,
                    max_segments=self.max_segments,
                )
                order = shuffled(seed_of("rows", self.seed, self.task_ids, window), len(rows))
                ids = drawn.tolist()
                self._plans[window] = [[ids[i] for i in rows[row]] for row in order.tolist()]
                while len(self._plans) > 3:
                    self._plans.popitem(last=False)
            return self._plans[window]

    def draws(self, window: int) -> np.ndarray:
        """The example ids that one window uses."""
        parts = []
        for i in self.task_ids:
            # Equal lengths are packed in the order of these draws: shuffle them, so that rows mix the tasks.
            parts.append(self._take(i, self._used(i, window), self._used(i, window + 1)))
        drawn = np.concatenate(parts)
        return drawn[shuffled(seed_of("draws", self.seed, self.task_ids, window), len(drawn))]

    def _used(self, task_id: int, windows: int) -> int:
        return windows * self._total * self._fixed[task_id] // (self._per_total * _ONE)

    def _take(self, task_id: int, begin: int, end: int) -> np.ndarray:
        """Draws `begin .. end` of one task out of its permutations."""
        members = self._members[task_id]
        size, parts = len(members), []
        while begin < end:
            epoch, at = divmod(begin, size)
            stop = min(end, (epoch + 1) * size)
            parts.append(members[self._order(task_id, epoch)[at : at + stop - begin]])
            begin = stop
        return np.concatenate(parts) if parts else members[:0]

    def _order(self, task_id: int, epoch: int) -> np.ndarray:
        last = self._orders.get(task_id)
        if last is None or last[0] != epoch:
            order = shuffled(seed_of("order", self.seed, task_id, epoch), len(self._members[task_id]))
            last = self._orders[task_id] = (epoch, order)
        return last[1]
