"""Four tasks one after the other: what one LoRA forgets, and what a bank of rank-1 experts that choose themselves does.

python -m experiments.mora_cl [--seeds=1] [--steps=60] [--items=8] [--workdir=runs/mora_cl]
    [--base=pkg:smollm2-135m-instruct] [--rate=1e-3] [--bank_rate=1e-3]

    sequential   one LoRA of rank 8                                          configs/sequential_lora.py
    mora         8 new rank-1 experts a task, 8 active, no router            configs/mora_cl.py
    linear       the same, chosen by a trained matrix instead of the keys    router.score=linear

Equal trained factors a task. Accuracy is the share of held-out answer tokens whose target is the likeliest;
`report/continual.json` of each run has the whole matrix. For the banks also: of the weight that tokens of a task's
held-out items give, the share that experts of that task get, in the end. Plain text. Stop it whenever you like:
finished runs are kept. Writes a results file and a picture, named after the base, beside this file.
"""

import json
import pathlib

import numpy as np

from experiments import word_tasks
from experiments.words import kept
from launch import flags
from molora_jax import config as schema
from molora_jax.io.files import write_atomically
from molora_jax.pictures import figure, save, shades

HERE = pathlib.Path(__file__).parent
FLAGS = [
    ("--seeds", dict(type=int, default=1)),
    ("--steps", dict(type=int, default=60, help="optimizer steps, of all four tasks together")),
    ("--items", dict(type=int, default=8, help="held-out items a task")),
    ("--base", dict(default="pkg:smollm2-135m-instruct", metavar="SOURCE")),
    ("--rate", dict(type=float, default=1e-3, help="of the one LoRA, whose scale is 2")),
    ("--bank_rate", dict(type=float, default=1e-3, help="of the banks, whose scale is 1")),
    ("--workdir", dict(default="runs/mora_cl", metavar="DIR")),
]
TASKS = tuple(word_tasks.TASKS)
SETTING = ("base", "steps", "items", "rate", "bank_rate")
VARIANTS = {"sequential": "sequential_lora", "mora": "mora_cl", "linear": "mora_cl"}


def config_of(name, seed, args, entries):
    import importlib

    from configs import common

    made = importlib.import_module(f"configs.{VARIANTS[name]}").get_config()
    rule = made.method.rules["all"]
    rule.adapter.dropout = 0.0
    if name == "sequential":
        rule.adapter = common.adapter(rank=8, alpha=16.0, dropout=0.0)
    elif name == "linear":
        rule.router.score = "linear"
    word_tasks.data(made, entries.values())
    made.seed, made.base.source = seed, args.base
    made.optim.update(learning_rate=args.rate if name == "sequential" else args.bank_rate, decay="constant", warmup=0)
    made.train.update(steps=args.steps, batch_size=4, save_every=0, log_every=5)
    made.eval.update(num_items=args.items, num_generated=0)
    schema.validate(made)
    return made


def own_share(run, held_out, items: int) -> list[list[float]]:
    """`[task of the text, task of the experts]`: shares of the weight that a text's tokens give, over all sites."""
    out = []
    for task in TASKS:
        total = np.zeros(len(TASKS))
        for word in held_out[:items]:
            ids, _ = word_tasks.pieces(run, task, word)
            gates = run.routing(run.tokenizer.decode(ids))["all"]
            each = sum(own.sum((0, 1)) for own in gates.values())
            total += each.reshape(len(TASKS), -1).sum(-1)
        out.append((total / total.sum()).tolist())
    return out


def main(argv):
    _, args = flags.parse(__doc__, FLAGS, argv, need_config=False)
    from molora_jax import runtime

    runtime.configure()
    from molora_jax.evaluation.run import load_run
    from molora_jax.training.loop import train

    work, path = pathlib.Path(args.workdir).absolute(), HERE / f"{args.base.partition(':')[2]}.json"
    entries, held_out = word_tasks.write(work)
    setting = {name: value for name, value in vars(args).items() if name in SETTING}
    found = kept(path, **setting)
    for seed in range(args.seeds):
        for name in VARIANTS:
            key, folder = f"{name} | seed {seed}", work / f"{name}-{seed}"
            if key in found["runs"]:
                continue
            train(config_of(name, seed, args, entries), str(folder))
            result = json.loads((folder / "report" / "continual.json").read_text()) | {"tasks": list(TASKS)}
            if name != "sequential":
                result["weight"] = own_share(load_run(folder, "latest"), held_out, 4)
            found["runs"][key] = result
            write_atomically(path, json.dumps(found, indent=1) + "\n")
    report(found, path.with_suffix(".png"))
    return 0


def report(found, path):
    fig, axes = figure(1, len(VARIANTS), figsize=(3.6 * len(VARIANTS), 3.6), layout="constrained", sharey=True)
    for ax, name in zip(axes, VARIANTS, strict=True):
        runs = [run for key, run in found["runs"].items() if key.startswith(f"{name} |")]
        a = 100 * np.array([run["accuracy"] for run in runs], float)
        for j, (task, colour) in enumerate(zip(TASKS, shades(len(TASKS)), strict=True)):
            for one in a if len(a) > 1 else ():
                ax.plot(range(len(TASKS)), one[:, j], color=colour, lw=0.8, alpha=0.5)
            ax.plot(range(len(TASKS)), a[:, :, j].mean(0), "o-", color=colour, lw=2.2, label=task)
        told = {what: 100 * np.mean([run[what] for run in runs]) for what in ("average_accuracy", "forgetting",
                                                                             "backward_transfer")}  # fmt: skip
        learnt = np.mean([np.diag(one) for one in a])
        print(f"{name:<12}own task learnt {learnt:.1f}  " + "  ".join(f"{what} {x:+.1f}" for what, x in told.items()))
        end = zip(TASKS, a[:, -1].mean(0), strict=True)
        print(f"{'':<12}in the end " + "  ".join(f"{task} {x:.1f}" for task, x in end))
        if "weight" in runs[0]:
            share = np.mean([run["weight"] for run in runs], axis=0)
            print(f"{'':<12}weight of own experts " + "  ".join(f"{100 * x:.1f}" for x in np.diag(share)))
        ax.set(title=name, xticks=range(len(TASKS)), xlabel="after training on", ylim=(0, 102))
        ax.set_xticklabels(TASKS)
        ax.grid(alpha=0.3)
    axes[0].set(ylabel="held-out answer tokens right (%)")
    axes[0].legend(frameon=False, loc="lower left", fontsize=8)
    print(save(fig, path))


if __name__ == "__main__":
    flags.main(main)
