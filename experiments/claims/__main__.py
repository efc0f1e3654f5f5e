"""Claims of papers against the sandbox's leaderboard: a page each, with its figure and its verdict.

python -m experiments.claims [--claims=all|a,b] [--run] [--seeds=5] [--results=experiments/leaderboard/sandbox]
    [--out=experiments/claims]

Without --run nothing is trained: pages are written of the claims whose methods have runs in --results, and those that
have none are told. --run makes the rows that are missing, as experiments.leaderboard does.
"""

import math
import pathlib

from experiments.claims.claims import CLAIMS, judged, measured, steps
from experiments.leaderboard import __main__ as leaderboard
from experiments.leaderboard import compared, report
from launch import flags
from molora_jax import pictures
from molora_jax.io.files import write_atomically

FLAGS = [
    ("--claims", dict(default="all", help="all, or some of " + ", ".join(CLAIMS))),
    ("--run", dict(action="store_true", help="train the rows that are missing")),
    ("--seeds", dict(type=int, help="seeds 0 to N - 1; 5")),
    ("--results", dict(default="experiments/leaderboard/sandbox", metavar="DIR", help="holds results.json")),
    ("--out", dict(default="experiments/claims", metavar="DIR", help="holds a page and a picture a claim")),
    ("--workdir", dict(default="runs/leaderboard", metavar="DIR", help="where unfinished runs are")),
]


def main(argv):
    _, args = flags.parse(__doc__, FLAGS, argv, need_config=False)
    names = list(CLAIMS) if args.claims == "all" else [name.strip() for name in args.claims.split(",")]
    for name in names:
        if name not in CLAIMS:
            near = flags.did_you_mean(name, CLAIMS)
            raise flags.wrong("--claims", repr(name), "all, or names among " + ", ".join(CLAIMS), near)
    status = 0
    for name in names:
        claim = CLAIMS[name]
        seeds = [f"--seeds={args.seeds}"] if args.seeds else []
        where = [f"--out={args.results}", f"--workdir={args.workdir}", "--cost_steps=0"]
        asked = ["--base=sandbox:6m", f"--methods={','.join(claim.order)}", f"--tables={claim.table}", *where, *seeds]
        if args.run:
            status |= leaderboard.main(asked)
        with leaderboard.opened(asked) as (board, _):
            rows = {
                row.entry.method: row
                for row in map(lambda e: report.Row(e, board.results.tree), board.known()[claim.table])
            }
            base = board.results.tree["base"]
        missing = [method for method in claim.order if len(rows[method].runs) < 2]
        if missing:
            print(f"{name}: not told: fewer than two seeds of {', '.join(missing)} in {args.results}")
            continue
        runs = {method: row.runs for method, row in rows.items()}
        found = steps(claim, runs, base)
        folder = pathlib.Path(args.out)
        folder.mkdir(parents=True, exist_ok=True)
        draw(claim, rows, base, folder / f"{name}.png")
        write_atomically(folder / f"{name}.md", page(name, claim, rows, base, found))
        print(f"{name}: {judged(found)}: {folder / name}.md")
    return status


def page(name, claim, rows, base, found) -> str:
    title = lambda method: rows[method].title if method else "zero"  # noqa: E731
    what = {
        "nll": "the mean over all ten tasks, in nats",
        "forgotten": "what is forgotten of the pretraining text, in nats",
        "experts": "experts a token uses on easy tasks minus those on hard ones",
        "consistency": "SRP of 16 tokens on the pretraining text below that of the same loads without memory",
    }.get(claim.measure, f"the mean over the family `{claim.measure}`, in nats")
    lines = [
        f"# {claim.title}: {judged(found)}\n",
        f"**Claim** ([{claim.paper}](https://arxiv.org/abs/{claim.paper})). {claim.says}\n",
        f"**Protocol.** That of the [sandbox's leaderboard](../leaderboard/README.md), table `{claim.table}`;",
        f"measured: {what}, less is better. `python -m experiments.claims --claims={name} --run`\n",
    ]
    lines += ["| step of the claim | seeds | difference | p |", "|---|---|---|---|"]
    for better, worse, d in found:
        lines.append(f"| {title(better)} minus {title(worse)} | {d.seeds} | {compared.said(d)} | {d.p:.2g} |")
    lines += ["", *(_value(rows[method], base, claim) for method in claim.order)]
    lines += [f"\n![Each seed of each method]({name}.png)\n", f"**Verdict.** At this size the claim {judged(found)}.\n"]
    lines += [f"**What would change it.** {claim.change} Rates that were taken: " +
              ", ".join(f"{title(method)} {rows[method].entry.rate}" for method in claim.order) + "."]  # fmt: skip
    return "\n".join(lines) + "\n"


def _value(row, base, claim) -> str:
    values = [measured(run, base, claim.measure) for run in row.runs.values()]
    mean, half = report.t_interval(values)
    told = "" if math.isnan(half) else f" \u00b1 {half:.3f}"
    return f"- {row.title}: {mean:.3f}{told}, {row.entry.trainable:,} trained parameters"


def draw(claim, rows, base, path):
    """A row a method in the claim's order; seeds that belong together are joined."""
    figure, axes = pictures.figure(figsize=(6, 1.0 + 0.5 * len(claim.order)), layout="constrained")
    points = {m: {s: measured(run, base, claim.measure) for s, run in rows[m].runs.items()} for m in claim.order}
    for i, (one, other) in enumerate(zip(claim.order, claim.order[1:], strict=False)):
        for seed in points[one].keys() & points[other].keys():
            axes.plot([points[one][seed], points[other][seed]], [i, i + 1], color=pictures.BASE, lw=1, zorder=1)
    for i, method in enumerate(claim.order):
        axes.plot(list(points[method].values()), [i] * len(points[method]), "o", color=pictures.TUNED, ms=6, zorder=2)
    axes.set_yticks(range(len(claim.order)), [rows[method].title for method in claim.order])
    axes.invert_yaxis()
    unit = {"consistency": "SRP without memory minus SRP", "experts": "experts, easy minus hard tasks"}
    wanted = "each row left of the one below it" if len(claim.order) > 1 else "left of zero"
    told = f"{unit.get(claim.measure, 'nats')} (less is better), a dot a seed; the claim: {wanted}"
    axes.set_xlabel(told, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    pictures.save(figure, path)


if __name__ == "__main__":
    flags.main(main)
