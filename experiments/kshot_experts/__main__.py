"""From K examples to an expert: picks LoRAs and open data by them, then tunes a top-2 mixture (arXiv 2408.15915).

python -m experiments.kshot_experts --rows=FILE.jsonl --workdir=DIR [--bank=DIR,DIR,...] [--pool=TASKS]
    [--experts=4] [--candidates=6] [--by=both|ppl|accuracy] [--target_num=1000] [--order=distance|partition]
    [--gate_only] [--test=FILE.jsonl] [--config.train.steps=200 ...]

FILE.jsonl holds an object a line: {"prompt": ..., "rationale": ..., "target": ...}. --bank: runs of plain LoRAs of one
recipe; without it a LoRA a task of the mixture is trained first, in DIR/bank. --pool: open data, as data.tasks. Writes
DIR/selection.json (scores, groups, rows), DIR/rows.jsonl (the K examples and the picked rows) and DIR/tuned, a run that
launch.evaluate and launch.generate open. Fields of the training config may be overridden; the same command goes on.
"""

import json
import pathlib
import sys

import numpy as np

from configs import common, kshot_experts
from experiments.kshot_experts import models, rows
from launch import flags
from molora_jax.errors import InputError
from molora_jax.io.files import write_atomically
from molora_jax.text import table

FLAGS = [
    ("--rows", dict(required=True, metavar="FILE.jsonl", help="K labelled examples")),
    ("--workdir", dict(required=True, metavar="DIR")),
    ("--bank", dict(metavar="DIR,DIR", help="runs of plain LoRAs (default: one trained on each task)")),
    ("--bank_steps", dict(type=int, default=60, help="of a LoRA of the default bank")),
    ("--pool", dict(default=common.TASKS, help="open data, as data.tasks")),
    ("--pool_rows", dict(type=int, default=500, help="most rows of each task of the pool")),
    ("--embed", dict(default="pkg:all-minilm-l6-v2", help="the base that embeds rows")),
    ("--by", dict(default="both", choices=("both", "ppl", "accuracy"), help="what ranks the bank")),
    ("--candidates", dict(type=int, default=6, help="of the bank, by rank")),
    ("--experts", dict(type=int, default=4, help="of the candidates, the least alike")),
    ("--target_num", dict(type=int, default=1000, help="rows to tune on before doubles go, the K examples among them")),
    ("--within", dict(type=float, default=0.1, help="cosine distance of a double")),
    ("--order", dict(default="distance", choices=("distance", "partition"), help="which of two doubles is earlier")),
    ("--gate_only", dict(action="store_true", help="the chosen LoRAs stay as they are")),
    ("--test", dict(metavar="FILE.jsonl", help="held-out rows to measure in the end")),
    ("--max_new_tokens", dict(type=int, default=48, help="of an answer")),
]
RANK = 16


def defaults(args):
    config = kshot_experts.get_config()
    config.train.update(steps=200, batch_size=8)
    config.optim.learning_rate = 5e-5  # the experts are finished LoRAs
    return config


def run(argv):
    config, args = flags.parse(__doc__, FLAGS, argv, need_config=False, defaults=defaults)
    examples, test = rows.read(args.rows), rows.read(args.test) if args.test else []
    check(args, examples, test)
    from molora_jax import runtime

    runtime.configure()
    folder = pathlib.Path(args.workdir).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    bank = args.bank.split(",") if args.bank else own_bank(config, folder / "bank", args.bank_steps)
    told = {"experts": picked_models(bank, examples, args), "data": None}
    told["data"] = picked_rows(config, examples, test, args, folder / "rows.jsonl")
    write_atomically(folder / "selection.json", json.dumps(told, indent=1) + "\n")
    tuned = tune(config, folder / "tuned", told["experts"]["chosen"], folder / "rows.jsonl", gate_only=args.gate_only)
    if test:
        print(measured(tuned, test, args.max_new_tokens))
    print(tuned)


def check(args, examples, test):
    """Raises InputError for numbers that cannot be, and for an example that is also a test row."""
    if not 2 <= args.experts <= args.candidates:
        raise InputError(
            "--experts", got=str(args.experts), expected=f"from 2 to --candidates={args.candidates}: two are active"
        )
    if args.target_num < len(examples):
        raise InputError("--target_num", got=str(args.target_num), expected=f"at least K = {len(examples)}")
    if not 0 <= args.within < 1:
        raise InputError("--within", got=str(args.within), expected="a cosine distance from 0 to less than 1")
    both = {row["prompt"] for row in examples} & {row["prompt"] for row in test}
    if both:
        raise InputError(
            "--test", got=f"{min(both)[:80]!r}, which is one of the K examples", expected="other rows than --rows has",
            fix="Take it out of one of the files: it is trained on.",
        )  # fmt: skip


def own_bank(config, folder, steps) -> list[str]:
    """A LoRA for each task of the mixture; trained once."""
    out = []
    for seed, task in enumerate(common.TASKS.split(",")):
        made = config.copy_and_resolve_references()
        with made.unlocked():
            adapter = common.adapter(rank=RANK, alpha=float(RANK))
            made.method.rules = dict(all=common.rule("q,v", adapter=adapter))
            made.data.tasks, made.seed = task, seed
            made.optim.learning_rate, made.train.steps = 2e-4, steps
        out.append(trained(made, folder / task))
    return out


def trained(config, workdir) -> str:
    from molora_jax import config as schema
    from molora_jax.training.loop import train

    schema.validate(config)
    if not (workdir / "checkpoints" / str(config.train.steps)).is_dir():
        train(config, str(workdir), note=say)
    return str(workdir)


def picked_models(bank, examples, args) -> dict:
    """Scores of the bank, the candidates, the group; printed as a table.

    Raises:
      InputError: fewer LoRAs than candidates, a run that is no plain LoRA, LoRAs of different recipes.
    """
    import molora_jax as mj

    if len(set(bank)) < max(len(bank), args.candidates):
        got = f"{len(set(bank))} different runs"
        raise InputError("--bank", got=got, expected=f"at least --candidates={args.candidates}, each once")
    ppl, right, every = [], [], []
    for path in bank:
        opened = mj.load_run(path)
        every.append(models.tensors(path, opened))
        ppl.append(models.reasoning_ppl(opened, examples))
        right.append(models.accuracy(opened, examples, max_new_tokens=args.max_new_tokens))
    candidates = models.ranked(ppl, right, args.by)[: args.candidates]
    pairs = models.similarities([every[i] for i in candidates], [bank[i] for i in candidates])
    places, alike = models.group(pairs, range(len(candidates)), args.experts)
    chosen = sorted(candidates[i] for i in places)
    mark = lambda i: "expert" if i in chosen else "candidate" if i in candidates else ""  # noqa: E731
    cells = [(path, f"{ppl[i]:.3f}", f"{right[i]:.0%}", mark(i)) for i, path in enumerate(bank)]
    say(table([("LoRA", "reasoning ppl", "exact", ""), *cells], right=(1, 2)))
    scores = [dict(path=path, reasoning_ppl=ppl[i], accuracy=right[i]) for i, path in enumerate(bank)]
    return dict(
        bank=scores, by=args.by, candidates=[bank[i] for i in candidates], chosen=[bank[i] for i in chosen],
        similarity=alike, tensors=len(every[0]),
    )  # fmt: skip


def picked_rows(config, examples, test, args, path) -> dict:
    """Writes the rows to tune on, the K examples first; counts by task of the pool."""
    from molora_jax import data as data_lib
    from molora_jax.io.base import load_base

    base, pool = load_base(config.base.source), config.data.copy_and_resolve_references()
    with pool.unlocked():
        pool.tasks, pool.valid = args.pool, ""
    data = data_lib.build(pool, tokenizer=base.tokenizer, batch_size=8, seed=0)
    known = {row["prompt"] for row in (*examples, *test)}
    split, every = data.splits["train"], []
    for task in range(len(data.task_names)):
        found = [split.example(i) for i in np.flatnonzero(split.task_ids == task)[: args.pool_rows]]
        every += [example for example in found if example.prompt not in known]
    embedder = load_base(args.embed)
    shots = [rows.text_of(row["prompt"], models.solution(row)) for row in examples]
    probe = rows.embedded(embedder, shots).mean(axis=0)
    vectors = rows.embedded(embedder, [rows.text_of(example.prompt, example.target) for example in every])
    near = rows.nearest(vectors, probe, args.target_num - len(examples), order=args.order)
    kept = rows.distinct(vectors, near, args.within)
    written = [{"prompt": row["prompt"], "target": models.solution(row)} for row in examples]
    written += [{"prompt": every[i].prompt, "target": every[i].target} for i in kept]
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in written))
    tasks = [every[i].task for i in kept]
    counts = {name: tasks.count(name) for name in data.task_names}
    say(f"rows: {len(examples)} examples, {len(near)} near ones of {len(every)}, {len(kept)} without doubles: {counts}")
    return dict(pool=len(every), near=len(near), kept=len(kept), by_task=counts, order=args.order, embed=args.embed)


def tune(config, workdir, chosen, path, *, gate_only=False) -> str:
    """The tuning step on these rows, all of which train; experts sit where the chosen LoRAs do."""
    sites, rank = shape_of(chosen[0])
    made, fresh = config.copy_and_resolve_references(), kshot_experts.get_config(chosen, gate_only, rank=rank)
    with made.unlocked():
        made.method = fresh.method
        made.method.rules.mix.sites = sites
        made.data.update(tasks=f"jsonl:{path}".replace(",", "\\,"), test_share=0.0, valid="")
    return trained(made, workdir)


def shape_of(path) -> tuple[str, int]:
    """The projections and the rank of a LoRA, which those of its bank share."""
    import molora_jax as mj

    rules = mj.load_run(path).model.rules
    sites = [site for rule in rules for site in rule.projections]
    return ",".join(dict.fromkeys(sites)), max(rule.adapter.rank for rule in rules)


def measured(workdir, test, max_new_tokens) -> str:
    """A line on held-out rows."""
    import molora_jax as mj

    opened = mj.load_run(workdir)
    ppl, right = models.reasoning_ppl(opened, test), models.accuracy(opened, test, max_new_tokens=max_new_tokens)
    return f"{len(test)} held-out rows: reasoning ppl {ppl:.3f}, exact {right:.0%}"


def say(text):
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    flags.main(run)
