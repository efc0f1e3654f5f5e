"""`build`: from `config.data` to the training stream and the held-out items."""

import dataclasses
import difflib
import functools
import hashlib

import numpy as np

from molora_jax.data.encode import Options, identity, load_task, tokenizer_digest
from molora_jax.data.example import Encoded
from molora_jax.data.packing import choose_targets_per_row, empty_batch, pack, write_segment
from molora_jax.data.sources import SOURCES
from molora_jax.data.split import make_splits
from molora_jax.data.stream import Stream
from molora_jax.errors import InputError
from molora_jax.io.templates import parse_args


def build(config_data, *, tokenizer, batch_size: int, seed: int) -> "DataSet":
    """Reads, splits and tokenises the tasks of `config.data` (fields: see `configs/common.py`).

    Args:
      tokenizer: an `io.tokenizer.Tokenizer`.
      batch_size: B, rows of the global batch. seed: of the order of the training examples.

    Raises:
      InputError: an unknown task, a package that is not installed, a bad row or file, nothing left to train on.
    """
    entries = parse_tasks(config_data.tasks)
    _check(config_data)
    digest = tokenizer_digest(tokenizer)
    options = Options(
        system=config_data.system,
        train_on=getattr(config_data, "train_on", "last"),
        template_args=parse_args(getattr(config_data, "template_args", "")),
    )
    tasks = tuple(
        load_task(entry, tokenizer=tokenizer, digest=digest, options=options, bad_rows=config_data.bad_rows)
        for entry in entries
    )
    return DataSet(_distinct_names(tasks), config_data, batch_size=batch_size, seed=seed, pad_id=tokenizer.pad_id)


def parse_tasks(tasks: str) -> tuple[str, ...]:
    """The entries of `data.tasks`, checked by name only.

    Raises:
      InputError: none, one twice, or one that is neither a task nor `jsonl:PATH`.
    """
    entries = tuple(entry.strip() for entry in tasks.split(",") if entry.strip())
    known = f"task names ({', '.join(SOURCES)}) or jsonl:PATH, separated by commas"
    if not entries:
        raise InputError("data.tasks", got=repr(tasks), expected=known, fix="Name at least one task.")
    for entry in entries:
        if entries.count(entry) > 1:
            raise InputError("data.tasks", got=f"{entry!r} twice", expected="each task once", fix="Drop one.")
        if entry in SOURCES or (entry.startswith("jsonl:") and entry != "jsonl:"):
            continue
        near = difflib.get_close_matches(entry, list(SOURCES), n=1, cutoff=0.5)
        fix = f"Did you mean {near[0]!r}?" if near else "For a file of your own write `jsonl:PATH`."
        raise InputError("data.tasks", got=repr(entry), expected=known, fix=fix)
    return entries


def _check(config_data):
    choices = dict(overlong=("skip", "truncate", "error"), bad_rows=("error", "skip"))
    for field, allowed in choices.items():
        value = getattr(config_data, field)
        if value not in allowed:
            raise InputError(f"data.{field}", got=repr(value), expected=" or ".join(allowed), fix="Pick one of these.")
    if not config_data.temperature > 0:
        raise InputError("data.temperature", got=repr(config_data.temperature), expected="a number above 0")
    if config_data.seq_len < 8:
        raise InputError("data.seq_len", got=repr(config_data.seq_len), expected="at least 8")


def _distinct_names(tasks):
    """Two files of one stem, or a file named as a task, get a number: `train`, `train-2`."""
    taken, renamed = set(), []
    for task in sorted(tasks, key=lambda task: task.entry.startswith("jsonl:")):
        name, number = task.name, 2
        while name in taken:
            name, number = f"{task.name}-{number}", number + 1
        taken.add(name)
        renamed.append(dataclasses.replace(task, name=name))
    order = {task.entry: task for task in renamed}
    return tuple(order[task.entry] for task in tasks)


class DataSet:
    """The data of a run: `.train` (a Stream), `.heldout`, `.heldout_batches`, `.fingerprint`, `.report()`."""

    def __init__(self, tasks, config_data, *, batch_size: int, seed: int, pad_id: int):
        self.tasks, self.seq_len, self.pad_id = tasks, config_data.seq_len, pad_id
        self.task_names = tuple(task.name for task in tasks)
        self.splits = make_splits(tasks, seq_len=config_data.seq_len, overlong=config_data.overlong)
        every = [split for split in self.splits.values() if len(split.length)]
        # Both bounds hold for the held-out items too, so that evaluation compiles to the same shapes.
        longest = max((int(split.targets.max()) for split in every), default=1)
        shortest = min((int(split.positions.min()) for split in every), default=self.seq_len)
        stream = functools.partial(
            Stream,
            self.splits["train"],
            task_ids=tuple(range(len(tasks))),
            seq_len=self.seq_len,
            batch_size=batch_size,
            seed=seed,
            temperature=config_data.temperature,
            max_segments=max(1, self.seq_len // shortest),
            pad_id=pad_id,
        )
        drawn = stream(targets_per_row=self.seq_len).draws(0)
        train = self.splits["train"]
        bound = choose_targets_per_row(
            train.positions[drawn], train.targets[drawn], seq_len=self.seq_len, longest=longest
        )
        self.train = stream(targets_per_row=bound)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hex digest of the examples, the filters and the package versions; paths and file names do not enter."""
        parts = [
            ("jsonl" if task.entry.startswith("jsonl:") else identity(task.entry), task.content) for task in self.tasks
        ]
        return hashlib.sha256(repr(parts).encode()).hexdigest()

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
            members = np.flatnonzero(self.splits[split].task_ids == task_id).tolist()
            members.sort(key=lambda i: hashlib.sha256(repr(texts[rows[i]]).encode()).digest())
            chosen += [self.splits[split].example(i) for i in members[:items_per_task]]
        return chosen

    def heldout_batches(self, examples: list[Encoded], batch_rows: int, targets_per_row: int | None = None):
        """Packed batches `[batch_rows, S]` that hold every example once, all of one shape (the last one padded).

        They have the arrays of a training batch and `example_index`, int32: the index into `examples`, -1 at pads.

        Raises:
          InputError: an example longer than `seq_len`, or with more targets than `targets_per_row`.
        """
        limit = self.seq_len if targets_per_row is None else targets_per_row
        lengths = [len(example.ids) - 1 for example in examples]
        targets = [example.num_targets for example in examples]
        for example, length, target in zip(examples, lengths, targets, strict=True):
            if length > self.seq_len or target > limit:
                raise InputError(
                    f"held-out item of task {example.task!r}",
                    got=f"{length} positions, {target} of them targets",
                    expected=f"at most {self.seq_len}, at most {limit} of them targets",
                )
        rows = pack(lengths, targets, seq_len=self.seq_len, targets_per_row=limit, max_segments=self.train.max_segments)
        batches = []
        for first in range(0, len(rows), batch_rows):
            batch = empty_batch(batch_rows, self.seq_len, pad_id=self.pad_id)
            batch["example_index"] = np.full((batch_rows, self.seq_len), -1, np.int32)
            for row, members in enumerate(rows[first : first + batch_rows]):
                at = 0
                for segment, index in enumerate(members, start=1):
                    example, begin = examples[index], at
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

    def report(self) -> "Report":
        """What was read, what was left out, and how well it packs (over the first window of the stream)."""
        tasks = {}
        for task_id, task in enumerate(self.tasks):
            of = {name: split.task_ids == task_id for name, split in self.splits.items()}
            counts = [split.counts[task.name] for split in self.splits.values()]
            train = self.splits["train"]
            tasks[task.name] = dict(
                {name: int(mask.sum()) for name, mask in of.items()},
                share=self.train.shares[task_id],
                mean_tokens=float(train.length[of["train"]].mean()),
                mean_targets=float(train.targets[of["train"]].mean()),
                skipped=sum(count["skipped"] for count in counts),
                truncated=sum(count["truncated"] for count in counts),
                **{name.replace(" ", "_"): count for name, count in task.dropped.items() if count},
            )
        rows = self.train.plan(0)
        used = sum(int(self.splits["train"].positions[i]) for row in rows for i in row)
        return Report(
            tasks=tasks,
            padding=1.0 - used / (len(rows) * self.seq_len),
            examples_per_row=sum(map(len, rows)) / len(rows),
            targets_per_row=self.train.targets_per_row,
            max_segments=self.train.max_segments,
            fingerprint=self.fingerprint,
        )


class Report(dict):
    """A plain dict that prints as a table."""

    def __str__(self) -> str:
        head = f"{'task':<12}{'train':>8}{'valid':>7}{'test':>7}{'share':>7}{'tokens':>8}{'targets':>8}  left out"
        lines = [head]
        for name, row in self["tasks"].items():
            out = {k: v for k, v in list(row.items())[6:] if v}
            shown = ", ".join(f"{count} {key}" for key, count in out.items()) or "-"
            lines.append(
                f"{name:<12}{row['train']:>8}{row['valid']:>7}{row['test']:>7}{row['share']:>7.3f}"
                f"{row['mean_tokens']:>8.1f}{row['mean_targets']:>8.1f}  {shown}"
            )
        lines.append(
            f"padding {self['padding']:.1%}, {self['examples_per_row']:.2f} examples a row (at most "
            f"{self['max_segments']}), at most {self['targets_per_row']} loss positions a row"
        )
        return "\n".join(lines)
