"""Every low-rank method without a router, under one budget: what it learns, what a step costs, what it trains.

python -m experiments.lowrank [--methods=all|a,b,c] [--steps=40] [--seeds=2] [--workdir=runs/lowrank]
    [--out=experiments/lowrank] [--config.X=V ...]

The leaderboard's runs, costs and results file with another choice: methods whose rules are plain adapters on the
projections of their shipped configs, with LoRA's number of trained parameters where a method can have it, each at its
own config's learning rate times five (1e-3 for LoRA, the quickstart's). It goes on from results.json.
"""

from configs import common
from experiments.leaderboard import __main__ as leaderboard
from experiments.leaderboard import report, tables, work
from experiments.leaderboard.results import Results
from experiments.lowrank.picture import draw
from launch import flags
from molora_jax.catalogue.methods import METHODS
from molora_jax.io.base import load_base
from molora_jax.runs.workdir import Workdir

FLAGS = [
    ("--methods", dict(default="all", help="all, or names of molora_jax/catalogue without a router")),
    ("--steps", dict(type=int, default=40, help="optimizer steps of 512 tokens")),
    ("--seeds", dict(type=int, default=2, help="seeds 0 to N - 1")),
    ("--items", dict(type=int, default=16, help="held-out items a task")),
    ("--cost_steps", dict(type=int, default=3, help="measured steps of each pair with LoRA; 0 measures no cost")),
    ("--report", dict(action="store_true", help="run nothing: write results.md and .png of what is there")),
    ("--out", dict(default="experiments/lowrank", metavar="DIR", help="holds results.json, .md and .png")),
    ("--workdir", dict(default="runs/lowrank", metavar="DIR", help="where unfinished runs are")),
]
FASTER, WARMUP, TOKENS = 5.0, 4, 512


class Board(work.Board):
    def write(self):
        report.write(self.results.path.parent, self.results.tree, self.shown(), head=head, picture=draw)


def plain(name: str) -> bool:
    """Whether all rules of a method are adapters of projections, without a router."""
    rules = flags.load(flags.ROOT / METHODS[tables.base_of(name)].config).method.rules.values()
    return all("router" not in rule and "placement" not in rule and rule.sites != "ffn" for rule in rules)


def chosen(text: str) -> list[str]:
    names = tables.check_methods(text)
    routed = [name for name in names if not plain(name)]
    if routed and text != "all":
        raise flags.wrong("--methods", repr(routed[0]), "methods without a router", "See experiments.leaderboard.")
    return [name for name in names if name not in routed]


def entry(name: str, decoder, changes: list, seeds: int):
    """The leaderboard's entry of equal parameters, at the method's own rate."""
    found = tables.entry("params", name, decoder, changes, seeds)
    for config in found.configs:
        with config.unlocked():
            config.optim.learning_rate *= FASTER
            config.optim.warmup = WARMUP
    return found


def head(tree):
    setting = tree["setting"]
    changes = report.overrides(setting)
    steps = setting["budget"].partition("x")[0]
    yield "# Low-rank methods\n"
    yield f"Made by `python -m experiments.lowrank --steps={steps} --items={setting['items']}{changes}`."
    yield "Lower is better.\n"
    yield from report.machines(tree)
    yield f"- a step is {TOKENS} tokens, padding included; each method at its config's learning rate times {FASTER:g}"
    yield "- ± is the 95 % t-interval over n seeds; items and base are the same for all"
    yield "- step: CPU time over that of plain LoRA in turn, median of pairs (`launch.bench`)"


def main(argv):
    with leaderboard.interruptible():
        return _measured(argv)


def _measured(argv):
    _, changes = flags.split(argv)
    config, args = flags.parse(__doc__, FLAGS, argv, need_config=False, defaults=lambda args: common.get_config())
    if args.config:
        raise flags.wrong("--config", args.config, "nothing: --methods names the configs", "Leave it out.")
    for name, least in (("steps", 1), ("seeds", 1), ("items", 1), ("cost_steps", 0)):
        if getattr(args, name) < least:
            raise flags.wrong(f"--{name}", getattr(args, name), f"at least {least}")
    budget = f"{args.steps}x{TOKENS}"
    shared = changes + leaderboard.budget(budget, config.data.seq_len) + [("eval.num_items", str(args.items))]
    results = Results(args.out, {"budget": budget, "items": args.items, "config": dict(changes)})
    with Workdir(args.workdir):
        decoder = load_base(config.base.source, dtype=config.base.dtype).config
        plan = {"params": [entry(name, decoder, shared, args.seeds) for name in chosen(args.methods)]}
        lora = tables.settled("lora", {}, shared)
        one = lambda table, name, seeds: entry(name, decoder, shared, seeds)  # noqa: E731
        return leaderboard.go(Board(args.workdir, lora, plan, results, entry=one), args)


if __name__ == "__main__":
    flags.main(main)
