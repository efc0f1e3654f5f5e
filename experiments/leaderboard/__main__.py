"""Every method under one budget: what it learns, what a step costs, what it needs. Goes on from results.json.

python -m experiments.leaderboard [--base=sandbox:6m] [--budget=1000x256] [--methods=all|a,b,c] [--seeds=5]
    [--items=300] [--tables=rank,params] [--out=DIR] [--workdir=runs/leaderboard] [--check=SEED] [--config.X=V ...]

--base says what is compared (`protocol.py`): SmolLM2 on nine tasks of packages, or the sandbox on ten made ones, where
each row chooses its learning rate on validation items first. --budget is optimizer steps x tokens a step (whole rows of
data.seq_len, padding included). An override holds for every method and for the base. Each run is a process of its own:
a crash costs one row, which the next start tries again. --check=SEED runs finished rows anew and compares their bits.
"""

import contextlib
import re
import signal

from configs import common
from experiments.leaderboard import protocol as protocols
from experiments.leaderboard import work
from experiments.leaderboard.results import Results
from experiments.leaderboard.tables import FULL, TABLES, base_of, check_methods, entry, settled
from launch import flags
from molora_jax.io.base import load_base
from molora_jax.runs.workdir import Workdir

FLAGS = [
    ("--base", dict(default=protocols.DEFAULT, help="sandbox:6m, or another base.source, on SmolLM2's tasks")),
    ("--budget", dict(metavar="STEPSxTOKENS", help="optimizer steps x tokens a step; 40x512, sandbox: 1000x256")),
    ("--methods", dict(default="all", help="all, or names of molora_jax/catalogue; and full: fine-tuning")),
    ("--seeds", dict(type=int, help="seeds 0 to N - 1; 2, sandbox: 5")),
    ("--items", dict(type=int, help="held-out items a task; 16, sandbox: 300")),
    ("--tables", dict(default="rank,params", help="equal active rank, equal trainable parameters")),
    ("--cost_steps", dict(type=int, default=3, help="measured steps of each pair; 0 measures no cost")),
    ("--report", dict(action="store_true", help="run nothing: write results.md and .png of what is there")),
    ("--check", dict(type=int, metavar="SEED", help="run this seed of finished rows anew: the same bits?")),
    ("--out", dict(metavar="DIR", help="holds results.json, .md and .png; experiments/leaderboard[/sandbox]")),
    ("--workdir", dict(default="runs/leaderboard", metavar="DIR", help="where unfinished runs are")),
]
OURS = ("method", "losses", "schedule", "seed", "train", "eval")  # sections that budget, tables and seeds decide
FREE = ("train.remat",)


def main(argv):
    with interruptible(), opened(argv) as (board, args):
        return go(board, args) if args.check is None else check(board, args.check)


@contextlib.contextmanager
def opened(argv):
    """`(board, args)` of a command line; nothing runs yet, and no other process may use its workdir.

    Raises:
      InputError: whatever is wrong with the command line, or results of another setting.
    """
    _, changes = flags.split(argv)
    config, args = flags.parse(__doc__, FLAGS, argv, need_config=False, defaults=lambda args: common.get_config())
    if args.config:
        raise flags.wrong("--config", args.config, "nothing: --methods names the configs", "Leave it out.")
    for field, _ in changes:
        if field.partition(".")[0] in OURS and field not in FREE:
            raise flags.wrong(f"--config.{field}", "an override", f"a field outside {', '.join(OURS)}",
                              "Budget, tables and seeds set these.")  # fmt: skip
    protocol = protocols.of(args.base)
    for name in ("budget", "seeds", "items", "out"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(protocol, name))
    methods = check_methods(args.methods, (FULL,))
    if args.methods == "all" and not protocol.full:
        methods.remove(FULL)  # of 135 million parameters: only where it is asked for
    wanted = tables(args.tables)
    for name, least in (("seeds", 1), ("items", 1), ("cost_steps", 0), ("check", 0)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise flags.wrong(f"--{name}", getattr(args, name), f"at least {least}")
    if args.base != protocols.DEFAULT and protocol is protocols.REAL:
        changes = [("base.source", args.base), *changes]
    setting = {"budget": args.budget, "items": args.items, "config": dict(changes), **protocol.facts()}
    results = Results(args.out, setting)
    with Workdir(args.workdir):
        fixed = [*protocol.changes(args.workdir), *changes]
        config = settled("lora", {}, fixed)
        shared = [*fixed, *budget(args.budget, config.data.seq_len), ("eval.num_items", str(args.items))]
        decoder = load_base(config.base.source, dtype=config.base.dtype).config
        left = {name: why for name, why in protocol.left.items() if name in methods}
        if left and args.methods != "all":
            name, why = next(iter(left.items()))
            raise flags.wrong("--methods", repr(name), f"methods that have a sense on {args.base}", f"It has {why}.")
        methods, seeds = [name for name in methods if name not in left], max(args.seeds, (args.check or 0) + 1)

        def one(table, method, seeds):
            return entry(table, method, decoder, shared, seeds, protocol.own.get(base_of(method), {}).items())

        plan = {table: [one(table, method, seeds) for method in methods] for table in wanted}
        lora = settled("lora", {}, shared)
        yield work.Board(args.workdir, lora, plan, results, entry=one, protocol=protocol, left=left), args


def check(board, seed: int) -> int:
    same = []
    for table, entries in board.known().items():
        for one in entries:
            same.append(board.check(table, one, seed))
    return 0 if all(same) else 1


@contextlib.contextmanager
def interruptible():
    """SIGTERM ends the block as Ctrl-C does: the child is told to stop, and the results file is whole."""
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def interrupt(*_):
    raise KeyboardInterrupt


def go(board, args) -> int:
    """Everything that is not there yet; the exit status."""
    plan = {} if args.report else board.plan
    if plan:
        board.base()
    for seed in range(args.seeds):
        for table, entries in plan.items():
            for one in entries:
                if (one := board.rate(table, one)) is not None:
                    board.run(table, one, seed)
    for table, entries in board.known().items() if plan and args.cost_steps else ():
        for one in entries:
            if one.configs:
                board.cost(table, one, args.cost_steps)
    board.write()
    failed = board.results.tree["failed"].values()
    for message in failed:
        work.say(f"failed: {message.splitlines()[0]}")
    return 1 if failed else 0


def budget(text: str, seq_len: int) -> list[tuple[str, str]]:
    """`40x512` as the fields that it sets."""
    match = re.fullmatch(r"([1-9]\d{0,6})x([1-9]\d{0,6})", text)
    if not match:
        raise flags.wrong("--budget", repr(text), "STEPSxTOKENS_A_STEP, such as 40x512")
    steps, tokens = map(int, match.groups())
    if tokens % seq_len:
        expected = f"tokens a step in whole rows: a multiple of data.seq_len = {seq_len}"
        raise flags.wrong("--budget", tokens, expected, "Change it, or --config.data.seq_len.")
    fields = dict(steps=steps, batch_size=tokens // seq_len, save_every=0, keep=1, log_every=10)
    return [(f"train.{name}", str(value)) for name, value in fields.items()] + [("eval.num_generated", "0")]


def tables(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in TABLES:
            near = flags.did_you_mean(name, TABLES)
            raise flags.wrong("--tables", repr(name), "names among " + ", ".join(TABLES), near)
    return [name for name in TABLES if name in names]


if __name__ == "__main__":
    flags.main(main)
