"""`results.md` and `results.png` of a protocol that compares: paired differences, their intervals, verdicts, costs."""

import math
import pathlib
import statistics

import numpy as np

from experiments.leaderboard import rates, report, verdicts
from experiments.leaderboard.tables import FULL
from experiments.leaderboard.tasks import FAMILIES, FORGOTTEN
from molora_jax import pictures
from molora_jax.io.files import write_atomically

WORDS = {
    "better": "better than LoRA", "worse": "worse than LoRA", "equal": f"equal, within {verdicts.MARGIN} nats",
    "open": "cannot be told", "": "",
}  # fmt: skip
COLOURS = {"better": "#2a7f3f", "worse": "#b5382a", "equal": "#444444", "open": pictures.BASE, "": pictures.BASE}


def write(folder, tree: dict, plan: dict, *, left: dict):
    rows = {table: [report.Row(entry, tree) for entry in entries] for table, entries in plan.items()}
    found = {table: judged(group) for table, group in rows.items()}
    write_atomically(pathlib.Path(folder) / "results.md", text(tree, rows, found, left))
    draw(tree, rows, found, pathlib.Path(folder) / "results.png")


def judged(group) -> dict[str, tuple]:
    """`{method: (difference to LoRA, verdict, difference to full fine-tuning)}` of the rows that have runs."""
    by_name = {row.entry.method: row for row in group}
    lora, full = by_name.get("lora"), by_name.get(FULL)
    against = {row.entry.method: minus(row, lora) for row in group if row.runs and row is not lora}
    told = verdicts.verdicts(against)
    return {
        row.entry.method: (against.get(row.entry.method), told.get(row.entry.method, ""), minus(row, full))
        for row in group
        if row.runs
    }


def minus(row, other) -> verdicts.Difference | None:
    """Seed by seed, and by block of held-out items."""
    if other is None or other is row:
        return None
    seeds = [seed for seed in row.runs if seed in other.runs]
    blocks = [np.subtract(row.runs[s].get("blocks", []), other.runs[s].get("blocks", [])) for s in seeds]
    return verdicts.difference(
        [row.scores[s] - other.scores[s] for s in seeds], np.mean(blocks, axis=0) if blocks else ()
    )


def forgotten(row, base: dict | None) -> list[float]:
    """By how many nats a token each run is worse than the base on the text that it was pretrained on."""
    if not base or FORGOTTEN not in base.get("beside", {}):
        return []
    return [run["beside"][FORGOTTEN] - base["beside"][FORGOTTEN] for run in row.runs.values()]


# ---- text


def text(tree, rows, found, left) -> str:
    parts = [*_head(tree)]
    for table, group in rows.items():
        seen = sorted((row for row in group if row.runs), key=lambda row: row.mean)
        parts += [f"\n## {report.TITLES[table]}\n", *_summary(seen, found[table], tree["base"])]
        parts += ["\nNLL per answer token (nats) by task:\n", report._tasks(seen, tree["base"])]
        parts += ["\nChanged in the shipped configs (fields below `method.rules`), and the learning rate:\n"]
        parts += [report._changes(seen)]
        waiting = [row.title for row in group if not row.runs]
        parts += [f"\nNot run yet: {', '.join(waiting)}."] if waiting else []
    if left:
        parts += ["\n## Left out\n", *(f"- {name}: {why}" for name, why in left.items())]
    return "\n".join([*parts, *report.failed(tree)]) + "\n"


def _head(tree):
    setting = tree["setting"]
    changes = report.overrides(setting)
    yield "# Leaderboard on the sandbox\n"
    yield f"Made by `python -m experiments.leaderboard --base=sandbox:6m --budget={setting['budget']}"
    yield f"--items={setting['items']}{changes}`; the protocol is in [the README](../README.md). Lower is better.\n"
    yield from report.machines(tree)
    yield "- NLL: nats an answer token, mean over ten tasks; \u00b1 is the 95 % t-interval over n seeds"
    yield "- minus LoRA, minus full: paired by seed; in brackets what another draw of held-out items would add"
    yield "- verdict: paired t-test, Holm-corrected over the methods of the table, at 0.05"
    yield "- forgets: nats a token that the pretraining text is worse by, held-out rows of it"
    yield "- rate: of the grid, by validation loss at a seed of its own; * at an end of the grid"


def _summary(seen, found, base):
    head = ["method", "n", "rate", "NLL", "minus LoRA", "verdict", "minus full", "forgets", "step", "memory MB",
            "experts used", "rank at work", "trained"]  # fmt: skip
    yield "| " + " | ".join(head) + " |"
    yield "|---" * len(head) + "|"
    for row in seen:
        entry, (against, verdict, full) = row.entry, found[row.entry.method]
        rate = entry.rate + ("*" if entry.grid and rates.at_edge(entry.rate, entry.grid) else "")
        cells = [row.title + (" \u2020" if entry.cannot else ""), str(len(row.runs)), rate,
                 report._spread(list(row.scores.values()), "{:.3f}"), said(against), WORDS[verdict], said(full),
                 report._spread(forgotten(row, base), "{:+.3f}"),
                 "1" if entry.method == "lora" else f"{row.cost['median']:.2f}" if row.cost else "-",
                 report._mean(row.column("peak_mb"), "{:,.0f}"), report._mean(row.column("active_experts"), "{:.2f}"),
                 str(entry.rank or "-"), f"{entry.trainable:,}"]  # fmt: skip
        yield "| " + " | ".join(cells) + " |"
    for row in seen:
        if row.entry.cannot:
            yield f"\n\u2020 {row.title} does not meet the rule of this table: {row.entry.cannot}."


def said(d) -> str:
    if d is None:
        return "-"
    width = "" if math.isnan(d.width) else f" \u00b1 {d.width:.3f}"
    return f"{d.mean:+.3f}{width}" + ("" if math.isnan(d.items) else f" ({d.items:.3f})")


# ---- picture


def draw(tree, rows, found, path):
    """A row a method, best first: left its difference to LoRA with the interval, coloured by the verdict; right how
    much of the pretraining text it forgets. A pair of panels a table."""
    groups = {table: sorted((r for r in group if r.runs), key=lambda r: r.mean) for table, group in rows.items()}
    most = max([1, *map(len, groups.values())])
    figure, axes = pictures.figure(
        1, 2 * len(rows), figsize=(6.5 * len(rows), 1.8 + 0.32 * most), layout="constrained", squeeze=False,
        width_ratios=[2, 1] * len(rows),
    )  # fmt: skip
    for i, (table, seen) in enumerate(groups.items()):
        left, right = axes[0][2 * i : 2 * i + 2]
        for at, row in enumerate(seen):
            against, verdict, _ = found[table][row.entry.method]
            mean, width = (against.mean, against.width) if against else (0.0, 0.0)
            colour = COLOURS[verdict]
            if not math.isnan(width):
                left.plot([mean - width, mean + width], [at, at], color=colour, lw=2)
            left.plot(mean, at, "o" if row.entry.method != "lora" else "D", color=colour, ms=6)
            lost = forgotten(row, tree["base"])
            if lost:
                right.barh(at, statistics.fmean(lost), color=pictures.TUNED, height=0.6)
        left.axvline(0, color="#222222", lw=1)
        left.axvspan(-verdicts.MARGIN, verdicts.MARGIN, color="#eeeeee", zorder=0)
        left.set_yticks(range(len(seen)), [row.title for row in seen])
        left.set_title(report.TITLES[table].replace(": ", ":\n", 1), fontsize=9, loc="left")
        left.set_xlabel("NLL minus LoRA's (nats; left is better), 95 %", fontsize=8)
        right.set_xlabel("forgotten of the\npretraining text (nats)", fontsize=8)
        right.set_yticks([])
        for ax in (left, right):
            ax.set_ylim(len(seen) - 0.4, -0.6)
            ax.locator_params(axis="x", nbins=5)
            ax.spines[["top", "right"]].set_visible(False)
        for verdict in ("better", "worse", "equal", "open") if i == 0 else ():
            left.plot([], [], "o", color=COLOURS[verdict], label=WORDS[verdict])
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    pictures.save(figure, path)


def by_family(result: dict) -> dict[str, float]:
    """The mean NLL of each family's tasks in a run."""
    return {name: statistics.fmean(result["nll"][task] for task in family) for name, family in FAMILIES.items()}
