"""The table of a run's data: what was read, what was left out and why, how often it is seen, how well it packs."""

from molora_jax.data.example import HELD_OUT

LARGE = 0.05  # fraction of a task's rows left out from which on a warning says what to change
REMEDY = {
    "skipped": 'longer than data.seq_len: raise it, or set data.overlong="truncate"',
    "repeats": "the same question and answer as another row",
    "bad rows": 'not readable: data.bad_rows="error" names the first',
    "weight 0": "nothing to train on in them",
    "ties": "the chosen and the rejected answer are the same",
}


class Report(dict):
    """A plain dict that prints as a table.

    tasks: {name: {train, valid, test (examples), share (of the draws), passes (draws of each example an epoch),
    mean_tokens, mean_targets, tokens (of the training examples), rows (read), kept, skipped, truncated, and bad_rows,
    repeats, weight_0 where there are some, unused {what: rows}}}. warnings: lines. epoch_steps: steps in which as many
    examples are drawn as all tasks have.
    """

    def __str__(self) -> str:
        head = ("task", "rows", "kept", "train", "valid", "test", "share", "passes", "tokens", "targets", "left out")
        table = [head]
        for name, row in self["tasks"].items():
            out = {key: row.get(key.replace(" ", "_"), 0) for key in ("skipped", "truncated", *list(REMEDY)[1:])}
            shown = ", ".join(f"{count:,} {key}" for key, count in out.items() if count) or "-"
            counts = (f"{row[key]:,}" for key in ("rows", "kept", "train", "valid", "test"))
            averages = f"{row['share']:.3f}", f"{row['passes']:.2f}", f"{row['mean_tokens']:.1f}"
            table.append((name, *counts, *averages, f"{row['mean_targets']:.1f}", shown))
        widths = [max(len(row[i]) for row in table) for i in range(len(head))]
        lines = []
        for row in table:
            cells = [cell.ljust(w) if i in (0, 10) else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))]  # noqa: B905
            lines.append("  ".join(cells).rstrip())
        lines.append(
            f"padding {self['padding']:.1%}, {self['examples_per_row']:.2f} examples a row (at most "
            f"{self['max_segments']}), at most {self['targets_per_row']} loss positions a row; an epoch is "
            f"{self['epoch_steps']:,} steps; held out: {self['held_out']}"
        )
        for name, row in self["tasks"].items():
            if row["unused"]:
                lines.append(f"not used, {name}: " + ", ".join(f"{k} ({n:,} rows)" for k, n in row["unused"].items()))
        return "\n".join(lines + self["warnings"])


def report(data) -> Report:
    """Of a `DataSet`; packing is measured over the first window of the stream."""
    train, tasks, warnings = data.splits["train"], {}, []
    total = sum(int((train.task_ids == i).sum()) for i in range(data.num_trained)) // data.unit
    for task_id, task in enumerate(data.tasks):
        of = {name: split.task_ids == task_id for name, split in data.splits.items()}
        count = {name: int(mask.sum()) // task.unit for name, mask in of.items()}
        once = ("train", "valid") if (task.split == HELD_OUT).any() else tuple(data.splits)  # those rows are in both
        left = {k: sum(data.splits[name].counts[task.name][k] for name in once) for k in ("skipped", "truncated")}
        dropped = {name: number for name, number in task.dropped.items() if number}
        kept = sum(count[name] for name in once)
        fraction = data.train.fractions.get(task_id, 0.0)
        length, targets = train.length[of["train"]], train.targets[of["train"]]
        row = tasks[task.name] = dict(
            count,
            share=fraction,
            passes=fraction * total / count["train"] if count["train"] else 0.0,
            mean_tokens=float(length.mean()) if len(length) else 0.0,
            mean_targets=float(targets.mean()) if len(targets) else 0.0,
            tokens=int(length.sum()),
            rows=kept + left["skipped"] + sum(dropped.values()),
            kept=kept,
            **left,
            **{name.replace(" ", "_"): number for name, number in dropped.items()},
            unused=dict(task.unused),
        )
        warnings += _warnings(task, row, left["skipped"], dropped)
    rows = data.train.plan(0)
    used = sum(int(train.positions[i + k]) for row in rows for i in row for k in range(data.unit))
    held_out = data.options.test_share
    parts = f"{held_out:.1%} of the rows by a hash, as many for valid" if held_out else "none: data.test_share=0.0"
    return Report(
        tasks=tasks,
        padding=1.0 - used / (data.unit * len(rows) * data.seq_len),
        examples_per_row=sum(map(len, rows)) / len(rows),
        targets_per_row=data.train.targets_per_row,
        max_segments=data.train.max_segments,
        epoch_steps=data.train.epoch_steps(),
        held_out=data.options.valid or parts,
        warnings=warnings,
        fingerprint=data.fingerprint,
    )


def _warnings(task, row, skipped, dropped):
    out = row["rows"] - row["kept"]
    if out > LARGE * row["rows"]:
        reasons = {"skipped": skipped, **dropped}
        reasons = [f"{number:,} {REMEDY.get(name, name)}" for name, number in reasons.items() if number]
        yield f"warning: {out:,} of the {row['rows']:,} rows of {task.name} are left out: {'; '.join(reasons)}"
    if row["truncated"] > LARGE * row["rows"]:
        cut = f"{row['truncated']:,} of the {row['rows']:,} rows of {task.name}"
        yield f"warning: {cut} are truncated to data.seq_len: raise it"
    if task.also_trained:
        yield f"warning: {task.also_trained:,} rows of data.valid are training rows of {task.name} as well"
    text, rows = task.asked
    if rows:
        yield (
            f"warning: to ask for an answer the chat template writes {text!r}, which {rows:,} rows of {task.name} do "
            "not have once the answer is there: answers start elsewhere in training than in generation. See "
            "data.template_args."
        )
    lost = [what for what in task.unused if not what.startswith("field ")]
    if lost:
        yield f"warning: the chat template writes nothing of {', '.join(lost)} ({task.name}): it is not trained on"
