"""`results.md` and `results.png` from `results.json` and the plan of the tables.

Intervals are over seeds: mean +- t(0.975, n - 1) s / sqrt(n) of n seeds, none at n = 1. All runs see the same held-out
items, and a seed's batches are the same for every method, so the difference to plain LoRA is taken seed by seed.
"""

import math
import pathlib
import statistics

from experiments.leaderboard.results import key
from molora_jax import pictures
from molora_jax.comparing import seeds
from molora_jax.io.files import write_atomically

TITLES = {
    "rank": "Equal active rank: R times the most experts of a token is 16",
    "params": "Equal trainable parameters: those of plain LoRA of rank 16, within 5 %",
}


def t_interval(values) -> tuple[float, float]:
    """`(mean, half width)` of the 95 % interval over independent values; NaN for a single one."""
    mean, low, _ = seeds.interval(values)
    return mean, math.nan if low is None else mean - low


class Row:
    """What is known of an entry: its finished runs by seed, and its cost."""

    def __init__(self, entry, tree):
        self.entry, self.title, keys = entry, entry.title, list(map(key, entry.configs))
        by_key = {run["key"]: run for run in tree["runs"]}
        self.runs = {seed: by_key[k] for seed, k in enumerate(keys) if k in by_key}
        self.cost = next((cost["ratio"] for cost in tree["costs"] if cost["key"] == (keys or [None])[0]), None)
        self.scores = {seed: statistics.fmean(run["nll"].values()) for seed, run in self.runs.items()}

    @property
    def mean(self) -> float:
        return statistics.fmean(self.scores.values()) if self.scores else math.inf

    def minus(self, other) -> list[float]:
        """Differences of the seeds that both have."""
        return [score - other.scores[seed] for seed, score in self.scores.items() if seed in other.scores]

    def column(self, name: str) -> list[float]:
        return [run[name] for run in self.runs.values() if run[name] is not None]


def write(folder, tree: dict, plan: dict, *, head=None, picture=None):
    """Both files, of what there is so far. `head(tree)` gives other first lines than the leaderboard's, `picture` draws
    another picture than `draw`."""
    rows = {table: sorted((Row(e, tree) for e in es), key=lambda row: row.mean) for table, es in plan.items()}
    write_atomically(pathlib.Path(folder) / "results.md", text(tree, rows, head or _head))
    (picture or draw)(rows, tree, pathlib.Path(folder) / "results.png")


# ---- text


def text(tree: dict, rows: dict, head) -> str:
    parts = [*head(tree)]
    for table, group in rows.items():
        lora = next((row for row in group if row.entry.method == "lora"), None)
        seen = [row for row in group if row.runs]
        parts += [f"\n## {TITLES[table]}\n", _summary(seen, lora)]
        parts += ["\nNLL per answer token (nats) by task:\n", _tasks(seen, tree["base"])]
        parts += ["\nChanged in the shipped configs (fields below `method.rules`):\n", _changes(group)]
        left = [row.title for row in group if not row.runs]
        parts += [f"\nNot run yet: {', '.join(left)}."] if left else []
    return "\n".join([*parts, *failed(tree)]) + "\n"


def failed(tree):
    """The section of what failed, where something did."""
    if tree["failed"]:
        yield "\n## Failed (the next start tries them again)\n"
        yield from (f"- {message.splitlines()[0]}" for message in tree["failed"].values())


def overrides(setting: dict) -> str:
    """The fields that a command line set, as it set them."""
    return "".join(f" --config.{field}={value}" for field, value in setting["config"].items())


def _head(tree):
    setting = tree["setting"]
    yield "# Leaderboard\n"
    budget, items, changes = setting["budget"], setting["items"], overrides(setting)
    yield f"Made by `python -m experiments.leaderboard --budget={budget} --items={items}{changes}` (more runs with"
    yield "`--methods` and `--seeds`; what is finished is kept). Lower is better.\n"
    yield from machines(tree)
    yield "- a budget is optimizer steps x tokens a step, padding included, whatever a step costs; X-LoRA spends half"
    yield "  of its steps on experts apart (s00), half on its head (s01), where a step passes the base once more"
    yield "- sites are those of the shipped configs: DynMoLE, LoRAMoE and Chain of Experts leave attention alone,"
    yield "  X-LoRA leaves up and down alone"
    yield "- \u00b1 is the 95 % t-interval over n seeds; items and base are the same for all"
    yield "- step: CPU time over that of plain LoRA in turn, median of pairs (`launch.bench`; X-LoRA with experts and"
    yield "  head training at once); memory: peak of the training process, base included"


def machines(tree):
    """A line for each machine that runs were made on."""
    found = {tuple(run["machine"][name] for name in ("processor", "threads", "jax", "dtype")) for run in tree["runs"]}
    for processor, threads, jax, dtype in sorted(found):
        yield f"- runs on {processor}, {threads} thread{'s' * (threads > 1)}, jax {jax}, base in {dtype}"


def _summary(group, lora):
    head = ["method", "n", "NLL", "minus LoRA", "step", "memory MB", "experts used", "rank at work", "trained", "loss"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in group:
        minus = row.minus(lora) if lora and row is not lora else []
        used, loss = row.column("active_experts"), [row.column(name) for name in ("first5", "last5")]
        note = " \u2020" if row.entry.cannot else ""
        cells = [row.title + note, str(len(row.runs)), _spread(list(row.scores.values()), "{:.3f}"),
                 _spread(minus, "{:+.3f}"), "1" if row is lora else f"{row.cost['median']:.2f}" if row.cost else "-",
                 _mean(row.column("peak_mb"), "{:,.0f}"), _mean(used, "{:.2f}"), str(row.entry.rank),
                 f"{row.entry.trainable:,}", " \u2192 ".join(_mean(x, "{:.2f}") for x in loss)]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    for row in group:
        if row.entry.cannot:
            lines.append(f"\n\u2020 {row.title} does not meet the rule of this table: {row.entry.cannot}.")
    if lora and lora.cost:
        spread = "{median:.2f} ({min:.2f} to {max:.2f})".format(**lora.cost)
        lines.append(f"\nstep: LoRA is the unit; paired with itself it measured {spread}, the noise of this column.")
    return "\n".join(lines) + "\n\nloss: mean of the first five and the last five training steps, answer tokens."


def _changes(group):
    """What a table changed in each config, for a run by hand."""
    lines = []
    for row in group:
        changes = [f"`{f.removeprefix('method.rules.')}={v}`" for f, v in row.entry.changes.items()]
        lines.append(f"- {row.title}: {', '.join(changes) or 'as shipped'}")
    return "\n".join(lines)


def _tasks(group, base):
    found = dict.fromkeys(name for row in group for run in row.runs.values() for name in run["nll"])
    names = list(base["nll"] if base else found)
    lines = ["| method | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    if base:
        lines.append("| base model | " + " | ".join(f"{base['nll'][n]:.3f}" for n in names) + " |")
    for row in group:
        cells = [_spread([r["nll"][n] for r in row.runs.values() if n in r["nll"]], "{:.3f}") for n in names]
        lines.append(f"| {row.title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _mean(values, form):
    return form.format(statistics.fmean(values)) if values else "-"


def _spread(values, form):
    if not values:
        return "-"
    mean, half = t_interval(values)
    return form.format(mean) + ("" if math.isnan(half) else f" \u00b1 {half:.3f}")


# ---- picture


def draw(rows: dict, tree: dict, path):
    """A panel a table: every seed as a dot, the interval of their mean as a line; the base's NLL is the title.

    The dots set the scale: an interval of two seeds may be wider than all differences. An arrow says where one is cut.
    """
    most = max(len(group) for group in rows.values())
    fig, axes = pictures.figure(
        1, len(rows), figsize=(6 * len(rows), 1.6 + 0.32 * most), layout="constrained", squeeze=False
    )
    for ax, (table, group) in zip(axes[0], rows.items(), strict=True):
        seen = [row for row in group if row.runs]
        for at, row in enumerate(seen):
            values = list(row.scores.values())
            mean, half = t_interval(values)
            ax.plot([mean - half, mean + half], [at, at], color=pictures.BASE, lw=2)
            ax.plot(values, [at] * len(values), "o", color=pictures.TUNED, ms=5)
        if seen:
            values = [v for row in seen for v in row.scores.values()]
            room = 0.1 * (max(values) - min(values)) + 0.01
            left, right = ax.set_xlim(min(values) - room, max(values) + room)
            for at, row in enumerate(seen):
                mean, half = t_interval(list(row.scores.values()))
                for end, marker, cut in ((left, "<", mean - half < left), (right, ">", mean + half > right)):
                    if cut:
                        ax.plot(end, at, marker, color=pictures.BASE, ms=7, clip_on=False, zorder=3)
        ax.set_yticks(range(len(seen)), [row.title for row in seen])
        ax.invert_yaxis()
        ax.set_title(TITLES[table].replace(": ", ":\n", 1), fontsize=9)
        ax.set_xlabel(
            "NLL per answer token, mean over tasks (nats)\na dot a seed, an arrow where an interval is cut", fontsize=8
        )
        ax.grid(axis="x", alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    if tree["base"]:
        fig.suptitle(f"base model: {statistics.fmean(tree['base']['nll'].values()):.3f}", fontsize=9)
    pictures.save(fig, path)
