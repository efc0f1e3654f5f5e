"""`build`: from `config.data` to the training stream and the held-out items."""

import dataclasses
import difflib
import functools
import hashlib

import numpy as np

from molora_jax.config.data_checks import of_family, repeated
from molora_jax.config.fields import TASK_FAMILIES
from molora_jax.config.resolve import file_of, split_commas
from molora_jax.config.values import raise_all
from molora_jax.data.encode import Task, load_tasks, tokenizer_digest
from molora_jax.data.example import Encoded
from molora_jax.data.options import Options
from molora_jax.data.packing import choose_targets_per_row, empty_batch, pack, write_segment
from molora_jax.data.read import identity, verifier
from molora_jax.data.report import Report, report
from molora_jax.data.sources import SOURCES
from molora_jax.data.split import make_splits
from molora_jax.data.stream import Stream
from molora_jax.data.valid import join_valid
from molora_jax.errors import InputError


def build(
    config_data, *, tokenizer, batch_size: int, seed: int, reads: str = "text", unit: int = 1
) -> "DataSet":  # fmt: skip
    """Reads, splits and tokenises the tasks of `config.data` (fields: see `configs/common.py`).

    Args:
      tokenizer: an `io.tokenizer.Tokenizer`.
      batch_size: B, rows of the global batch. seed: of the order of the training examples.
      reads: what the objective learns from, "text", "label" or "pair"; unit: its consecutive rows.

    Raises:
      InputError: an unknown task, a package that is not installed, a bad row or file, nothing left to train on.
    """
    entries, held_out = parse_tasks(config_data.tasks), _parse_valid(getattr(config_data, "valid", ""))
    options = Options.of(config_data, reads)
    digest = tokenizer_digest(tokenizer)
    load = functools.partial(load_tasks, tokenizer=tokenizer, digest=digest)
    training = dataclasses.replace(options, test_share=0.0) if options.valid else options
    tasks = _distinct_names(tuple(task for entry in entries for task in load(entry, options=training)))
    trained, valid = _fingerprint(tasks), ()
    fingerprint = trained
    if options.valid:
        valid = tuple(task for entry in held_out for task in load(entry, options=training, field="data.valid"))
        fingerprint = hashlib.sha256(repr((trained, "valid", _fingerprint(valid))).encode()).hexdigest()
    _check_fields(options, (*tasks, *valid))
    classes = _classes(tasks, options)
    tasks, valid = (tuple(_numbered(task, classes) for task in some) for some in (tasks, valid))
    return DataSet(
        join_valid(tasks, valid), options, unit=unit, classes=classes, batch_size=batch_size, seed=seed,
        pad_id=tokenizer.pad_id,
        num_trained=len(tasks), fingerprint=fingerprint, trained_fingerprint=trained,
    )  # fmt: skip


def parse_tasks(tasks: str) -> tuple[str, ...]:
    r"""The entries of `data.tasks`, checked by name only; a comma inside a path is written `\,`.

    Raises:
      InputError: none, one twice, or one that is no task, no name of a family (`rg:`, `bb:`) and no `jsonl:PATH`.
    """
    entries = split_commas(tasks)
    named = f"task names ({', '.join(SOURCES)}), {', '.join(TASK_FAMILIES.values())}"
    accepted = f"{named}, jsonl:PATH or parquet:PATH, by commas"
    if not entries:
        raise InputError("data.tasks", got=repr(tasks), expected=accepted, fix="Name at least one task.")
    raise_all(list(repeated("data.tasks", entries)))
    for entry in entries:
        if entry in SOURCES or of_family(entry) or file_of(entry):
            continue
        near = difflib.get_close_matches(entry, list(SOURCES), n=1, cutoff=0.5)
        fix = f"Did you mean {near[0]!r}?" if near else "For a file of your own write `jsonl:PATH`."
        raise InputError("data.tasks", got=repr(entry), expected=accepted, fix=fix)
    return entries


def _parse_valid(valid: str) -> tuple[str, ...]:
    """The entries of `data.valid`, checked by name only. Raises InputError where one is no file, or twice there."""
    entries = split_commas(valid) if isinstance(valid, str) else ()
    wrong = next((entry for entry in entries if not file_of(entry)), None)
    if wrong is not None or (valid and not entries):
        raise InputError(
            "data.valid", got=repr(wrong or valid), expected='jsonl:PATH or parquet:PATH, by commas, or ""',
            fix="Write jsonl: before the path of a file.",
        )  # fmt: skip
    raise_all(list(repeated("data.valid", entries)))
    return entries


def _distinct_names(tasks: tuple[Task, ...]) -> tuple[Task, ...]:
    """Two files of one stem, or a file's task named as a package's, get a number: `train`, `train-2`."""
    taken, renamed = set(), {}
    for i, task in sorted(enumerate(tasks), key=lambda item: bool(file_of(item[1].entry))):
        name, number = task.name, 2
        while name in taken:
            name, number = f"{task.name}-{number}", number + 1
        taken.add(name)
        renamed[i] = dataclasses.replace(task, name=name)
    return tuple(renamed[i] for i in range(len(tasks)))


def _fingerprint(tasks: tuple[Task, ...]) -> str:
    """Hex digest of the examples, the filters and the package versions; paths and file names do not enter."""
    parts = [("jsonl" if file_of(task.entry) else identity(task.entry), task.content) for task in tasks]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _check_fields(options: Options, tasks: tuple[Task, ...]):
    """A name of `data.fields` that no row of any file has is a mistake."""
    files = [task for task in tasks if file_of(task.entry)]
    missing = [own for own in options.names if not any(own in task.fields for task in files)]
    if missing:
        raise InputError(
            "data.fields", got=f"{missing[0]!r}, which no row has", expected="names of fields of the rows",
            fix="Correct the name, or take it out.",
        )  # fmt: skip


def _classes(tasks: tuple[Task, ...], options: Options) -> tuple[str, ...]:
    """The classes of all tasks that train, in the order of their numbers; () where rows have none."""
    classes = tuple(sorted({label for task in tasks for label in task.labels}))
    if options.reads == "label" and len(classes) < 2:
        raise InputError(
            "data.tasks", got=f"rows of one class, {classes[0]!r:.80}", expected="at least two classes",
            fix="Add rows of another one.",
        )  # fmt: skip
    return classes


def _numbered(task: Task, classes: tuple[str, ...]) -> Task:
    """The task with its own classes numbered among all."""
    if not task.labels or task.labels == classes:
        return task
    missing = [label for label in task.labels if label not in classes]
    if missing:
        raise InputError(
            f"data.valid, {task.name}", got=f"a class {missing[0]!r:.80}, which no row of data.tasks has",
            expected=f"some of {', '.join(classes)[:200]}", fix="Correct the label, or leave such rows out.",
        )  # fmt: skip
    ids, last = task.ids.copy(), task.offsets[1:] - 1
    ids[last] = np.array([classes.index(label) for label in task.labels], np.int32)[ids[last]]
    return dataclasses.replace(task, ids=ids, labels=classes)


class DataSet:
    """The data of a run: `.train` (a Stream), `.heldout`, `.heldout_batches`, `.fingerprint`, `.report()`.

    tasks: those that train, `num_trained` of them, then those of `data.valid` alone. fingerprint: hex digest of the
    examples, the filters and the package versions; paths and file names do not enter; trained_fingerprint: without
    those of `data.valid`. classes: the names of the classes of labelled rows. unit: consecutive rows of a batch that
    belong together.
    """

    def __init__(
        self, tasks: tuple[Task, ...], options: Options, *, batch_size: int, seed: int, pad_id: int, num_trained: int,
        fingerprint: str, trained_fingerprint: str, unit: int = 1, classes: tuple[str, ...] = (),
    ):  # fmt: skip
        self.unit, self.classes = unit, classes
        self.tasks, self.options, self.seq_len, self.pad_id = tasks, options, options.seq_len, pad_id
        self.task_names = tuple(task.name for task in tasks)
        self.num_trained, self.fingerprint, self.trained_fingerprint = num_trained, fingerprint, trained_fingerprint
        self.splits = make_splits(tasks, seq_len=options.seq_len, overlong=options.overlong)
        every = [split for split in self.splits.values() if len(split.length)]
        # Both bounds hold for the held-out items too, so that evaluation compiles to the same shapes.
        longest = max((int(split.targets.max()) for split in every), default=1)
        shortest = min((int(split.positions.min()) for split in every), default=self.seq_len)
        stream = functools.partial(
            Stream,
            self.splits["train"],
            task_ids=tuple(range(num_trained)),
            seq_len=self.seq_len,
            batch_size=batch_size,
            seed=seed,
            temperature=options.temperature,
            max_segments=max(1, self.seq_len // shortest),
            pad_id=pad_id,
            unit=unit,
        )
        drawn = stream(targets_per_row=self.seq_len, seed=0).draws(0)  # of no run's seed: another one compiles nothing
        train = self.splits["train"]
        bound = choose_targets_per_row(
            train.largest("positions", unit)[drawn], train.largest("targets", unit)[drawn], seq_len=self.seq_len,
            longest=longest,
        )  # fmt: skip
        self.train = stream(targets_per_row=bound)

    def heldout(self, split: str, items_per_task: int) -> list[Encoded]:
        """At most `items_per_task` items a task of "valid" or "test", task by task.

        Taken in the order of a hash of their text, not in file order. The seed of the run does not enter, so all runs
        are measured on the same items; asking for more only adds to them.
        """
        if split not in ("valid", "test"):
            raise ValueError(f"split {split!r} is neither 'valid' nor 'test'")
        chosen = []
        for task_id in range(len(self.tasks)):
            texts, rows = self.tasks[task_id].texts, self.splits[split].rows
            members = np.flatnonzero(self.splits[split].task_ids == task_id)[:: self.unit].tolist()
            members.sort(key=lambda i: hashlib.sha256(repr(texts[rows[i]]).encode()).digest())
            chosen += [self.splits[split].example(i) for i in members[:items_per_task]]
        return chosen

    def heldout_of(self, name: str, split: str, items: int) -> list[Encoded]:
        """Those of `heldout` that are of a task: its name, or an entry of `data.tasks`, which may be several tasks."""
        ids = self.train.for_tasks(name).task_ids
        return [example for example in self.heldout(split, items) if example.task_id in ids]

    def heldout_batches(self, examples: list[Encoded], batch_rows: int, targets_per_row: int | None = None):
        """Packed batches `[batch_rows, S]` that hold every example once, all of one shape (the last one padded).

        They have the arrays of a training batch and `example_index`, int32: the index into `examples`, -1 at pads.

        Raises:
          InputError: an example longer than `seq_len`, or with more targets than `targets_per_row`.
        """
        limit = self.seq_len if targets_per_row is None else targets_per_row
        lengths = [max(len(side.ids) for side in example.unit) - 1 for example in examples]
        targets = [max(side.num_targets for side in example.unit) for example in examples]
        for example, length, target in zip(examples, lengths, targets, strict=True):
            if length > self.seq_len or target > limit:
                raise InputError(
                    f"held-out item of task {example.task!r}",
                    got=f"{length} positions, {target} of them targets",
                    expected=f"at most {self.seq_len}, at most {limit} of them targets",
                )
        rows = pack(lengths, targets, seq_len=self.seq_len, targets_per_row=limit, max_segments=self.train.max_segments)
        batches, unit = [], self.unit
        batch_rows = max(batch_rows // unit, 1) * unit
        for first in range(0, len(rows), batch_rows // unit):
            batch = empty_batch(batch_rows, self.seq_len, pad_id=self.pad_id)
            batch["example_index"] = np.full((batch_rows, self.seq_len), -1, np.int32)
            here = rows[first : first + batch_rows // unit]
            for row, members in ((unit * i + k, units) for i, units in enumerate(here) for k in range(unit)):
                at = 0
                for segment, index in enumerate(members, start=1):
                    example, begin = examples[index].unit[row % unit], at
                    at = write_segment(
                        batch,
                        row,
                        at,
                        segment,
                        ids=np.asarray(example.ids, np.int32),
                        mask=example.loss_mask,
                        task_id=example.task_id,
                        example_id=example.example_id,
                    )
                    batch["example_index"][row, begin:at] = index
            batches.append(batch)
        return batches

    def verifier(self, task_id: int):
        """`(question, answer) -> bool` of a task whose own code says what is right; None of others."""
        return verifier(self.tasks[task_id].entry)

    def labels(self, mentioned: set[str]) -> tuple[str, ...]:
        """Names of the tasks by id, for those who name tasks in a config: the entry of `data.tasks` where `mentioned`
        has it, else the task's own name."""
        return tuple(task.entry if task.entry in mentioned else task.name for task in self.tasks)

    def report(self) -> Report:
        """What was read, what was left out and why, and how well it packs; printed, a table."""
        return report(self)
