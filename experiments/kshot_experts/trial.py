"""The pipeline on a bank whose best LoRAs are known: two that can do half of a task each, two that guess, four others.

python -m experiments.kshot_experts.trial [--steps=200] [--tune_steps=60] [--seeds=2] [--workdir=runs/kshot_trial]

The task: of a word, the number of its first letter, then whether that is even ("g is letter 7: odd"). One true expert
saw words from a to m, the other from n to z; guessers saw the two answers at random, without the reasoning; the
others are LoRAs of tasks of the mixture. The base is that of experiments/starts. Finished runs are kept. Writes
results.json to --out.
"""

import json
import pathlib

import numpy as np

from configs import common
from experiments.kshot_experts import __main__ as pipeline
from experiments.kshot_experts import models, rows
from experiments.small_base import config_of
from experiments.starts.__main__ import first_base
from experiments.words import kept, words, write_rows
from launch import flags
from molora_jax.io.files import write_atomically
from molora_jax.text import table

FLAGS = [
    ("--steps", dict(type=int, default=200, help="of a LoRA of the bank")),
    ("--tune_steps", dict(type=int, default=60, help="of the mixtures")),
    ("--seeds", dict(type=int, default=2)),
    ("--embed", dict(default="pkg:all-minilm-l6-v2", help="the base that embeds rows")),
    ("--workdir", dict(default="runs/kshot_trial", metavar="DIR")),
    ("--out", dict(default="experiments/kshot_experts", metavar="DIR", help="of results.json")),
]
OTHERS, K, TEST, POOL, NEAR, RANK, RATE = ("morph", "math", "code", "emoji"), 10, 128, 400, 200, 8, 4e-3
WITHIN = 0.01  # rows of one task that differ in a word lie nearer than the paper's 0.1
TRUE, GUESS = ("first half", "second half"), ("guesser 1", "guesser 2")


def labelled(word) -> dict:
    number = ord(word[0]) - ord("a") + 1
    return dict(
        prompt=f"Word: {word}", rationale=f"{word[0]} is letter {number}:", target="odd" if number % 2 else "even"
    )


def task_of(seed):
    """`(K examples, test rows, pool, rows of the bank by name)` of disjoint words."""
    rng = np.random.default_rng(seed)
    every = sorted({word for word, _ in words() if word.isascii() and word.isalpha() and word.islower()})
    every = [every[i] for i in rng.permutation(len(every))]
    halves = [[w for w in every if w[0] <= "m"], [w for w in every if w[0] > "m"]]
    take = lambda n: [labelled(w) for half in halves for w in [half.pop() for _ in range(n // 2)]]  # noqa: E731
    examples, test, pool = take(K), take(TEST), take(POOL)
    plain = lambda row: {"prompt": row["prompt"], "target": models.solution(row)}  # noqa: E731
    bank = {name: [plain(labelled(w)) for w in half] for name, half in zip(TRUE, halves, strict=True)}
    for name in GUESS:
        bank[name] = [
            {"prompt": f"Word: {w}", "target": str(rng.choice(["odd", "even"]))} for half in halves for w in half
        ]
    return examples, test, [plain(row) for row in pool], bank


def config(source, tasks, steps, seed, rules):
    made = config_of(source, tasks, steps, seed, RATE)
    made.method.rules, made.data.test_share = rules, 0.0
    return made


def lora():
    return dict(all=common.rule("q,v", adapter=common.adapter(rank=RANK, alpha=float(RANK), dropout=0.0)))


def of_seed(folder, source, seed, args) -> dict:
    import molora_jax as mj
    from molora_jax import data as data_lib

    examples, test, pool, own = task_of(seed)
    folder.mkdir(parents=True, exist_ok=True)
    bank = {}
    for number, name in enumerate((*TRUE, *GUESS, *OTHERS)):
        tasks = write_rows(folder / f"bank-{number}.jsonl", own[name]) if name in own else name
        made = config(source, tasks, args.steps, 10 * seed + number, lora())
        bank[name] = pipeline.trained(made, folder / f"bank-{number}")
    names, opened = list(bank), [mj.load_run(path) for path in bank.values()]
    ppl = [models.reasoning_ppl(run, examples) for run in opened]
    right = [models.accuracy(run, examples, max_new_tokens=24) for run in opened]
    pairs = models.similarities([models.tensors(bank[n], run) for n, run in zip(names, opened, strict=True)], names)
    ranked = {by: models.ranked(ppl, right, by) for by in ("ppl", "accuracy", "both")}
    candidates = ranked["ppl"][:6]
    base = mj.load_base(source)
    pool_config = config(source, ",".join(OTHERS), 1, 0, lora())
    data = data_lib.build(pool_config.data, tokenizer=base.tokenizer, batch_size=8, seed=0)
    far, split = [], data.splits["train"]
    for task in range(len(OTHERS)):
        far += [split.example(i) for i in np.flatnonzero(split.task_ids == task)[:POOL]]
    every = pool + [{"prompt": example.prompt, "target": example.target} for example in far]
    embedder = mj.load_base(args.embed)
    vectors = rows.embedded(embedder, [rows.text_of(**row) for row in every])
    probe = rows.embedded(embedder, [rows.text_of(r["prompt"], models.solution(r)) for r in examples]).mean(axis=0)
    near = rows.nearest(vectors, probe, NEAR)
    found = {str(within): rows.distinct(vectors, near, within) for within in (WITHIN, 0.1)}
    shots = [{"prompt": row["prompt"], "target": models.solution(row)} for row in examples]
    file = write_rows(folder / "rows.jsonl", shots + [every[i] for i in found[str(WITHIN)]])
    random = np.random.default_rng(100 + seed).choice(len(names), 4, replace=False).tolist()
    groups = {
        "chosen: ppl, least alike": models.group(pairs, candidates, 4)[0],
        "ppl, most alike": models.group(-pairs, candidates, 4)[0],
        "the four of best ppl": ranked["ppl"][:4],
        "the four of best accuracy": ranked["accuracy"][:4],
        "random four": random,
    }
    scores = {"base": scored(base_of(source, opened[0]), test), "best LoRA": scored(opened[ranked["ppl"][0]], test)}
    for number, (name, members) in enumerate(groups.items()):
        made = config(source, file, args.tune_steps, seed, {})
        path = pathlib.Path(file.removeprefix("jsonl:"))
        tuned = pipeline.tune(made, folder / f"tuned-{number}", [bank[names[i]] for i in members], path)
        scores[name] = scored(mj.load_run(tuned), test)
    single = config(source, file, args.tune_steps, seed, lora())
    single.train.init_from = bank[names[ranked["ppl"][0]]]
    scores["best LoRA, tuned"] = scored(mj.load_run(pipeline.trained(single, folder / "single")), test)
    return dict(
        bank={name: dict(ppl=ppl[i], accuracy=right[i]) for i, name in enumerate(names)},
        ranked={by: [names[i] for i in order] for by, order in ranked.items()},
        groups={name: [names[i] for i in members] for name, members in groups.items()},
        alike={name: models.group(pairs, members, 4)[1] for name, members in groups.items()},
        in_domain=float(np.mean(near < len(pool))), kept={within: len(i) for within, i in found.items()}, test=scores,
    )  # fmt: skip


def base_of(source, like):
    from molora_jax.evaluation.run import load_base_run

    return load_base_run(like.config)


def scored(run, test) -> dict:
    """Nats a token of the solutions, and exact answers."""
    nll = run.nll([row["prompt"] for row in test], [models.solution(row) for row in test])
    return dict(nll=float(np.mean(nll)), exact=models.accuracy(run, test, max_new_tokens=24))


def main(argv):
    _, args = flags.parse(__doc__, FLAGS, argv, need_config=False)
    from molora_jax import runtime

    runtime.configure()
    workdir, path = pathlib.Path(args.workdir).absolute(), pathlib.Path(args.out) / "results.json"
    found = kept(path, steps=args.steps, tune_steps=args.tune_steps, embed=args.embed)
    source = first_base(workdir)
    for seed in range(args.seeds):
        if str(seed) not in found["runs"]:
            found["runs"][str(seed)] = of_seed(workdir / f"seed{seed}", source, seed, args)
            write_atomically(path, json.dumps(found, indent=1) + "\n")
    for seed, told in found["runs"].items():
        bank = [(name, f"{one['ppl']:.2f}", f"{one['accuracy']:.0%}") for name, one in told["bank"].items()]
        print(table([(f"bank, seed {seed}", "reasoning ppl", "exact"), *bank], right=(1, 2)))
        test = [
            (name, f"{s['nll']:.3f}", f"{s['exact']:.0%}", ", ".join(told["groups"].get(name, ())))
            for name, s in told["test"].items()
        ]
        print(table([("held out", "NLL", "exact", "experts"), *test], right=(1, 2)))
        print(f"of the {NEAR} nearest rows {told['in_domain']:.0%} in the domain; without doubles {told['kept']}\n")
    return 0


if __name__ == "__main__":
    flags.main(main)
