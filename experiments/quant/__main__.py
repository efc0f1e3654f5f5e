"""What `base.quant` costs in nats: SmolLM2 on the nine tasks' held-out rows, before and after a short training.

python -m experiments.quant [--items=16] [--steps=16] [--forms=none,int8,nf4] [--workdir=runs/quant]

The same LoRA (all seven projections) is trained on the base in each form, on equal rows. `none` are the float32 weights
that SmolLM2's GGUF file (Q4_1) stands for. What is measured is kept. Writes results.json beside this file.
"""

import json
import pathlib

import numpy as np

from configs import lora
from experiments.words import kept
from launch import flags
from molora_jax import config as schema
from molora_jax.io.files import write_atomically
from molora_jax.text import table

HERE = pathlib.Path(__file__).parent
FLAGS = [
    ("--items", dict(type=int, default=16, help="held-out items of each task")),
    ("--steps", dict(type=int, default=16, help="optimizer steps of the training; 0: none")),
    ("--forms", dict(default="none,int8,nf4")),
    ("--workdir", dict(default="runs/quant", metavar="DIR")),
]


def config_of(form: str, args):
    config = lora.get_config()
    config.base.quant = form
    config.train.update(steps=max(args.steps, 1), batch_size=4, save_every=max(args.steps, 1), log_every=1)
    config.optim.update(learning_rate=1e-3, warmup=2)
    config.eval.update(num_items=args.items, num_generated=0)
    schema.validate(config)
    return config


def before(form: str, args) -> dict:
    from molora_jax.core.trees import num_bytes
    from molora_jax.evaluation.run import load_base_run

    run = load_base_run(config_of(form, args))
    return nll(run, args, base=True) | {"bytes": num_bytes(run.params)}


def after(form: str, args) -> dict:
    from molora_jax.evaluation.run import load_run
    from molora_jax.training.loop import train

    workdir = pathlib.Path(args.workdir) / form
    train(config_of(form, args), str(workdir))
    return nll(load_run(workdir, "latest"), args, base=False)


def nll(run, args, *, base: bool) -> dict:
    """`{"nll": {task: nats an answer token}, "items": of all tasks}` on the test split."""
    from molora_jax.evaluation.progress import Phases
    from molora_jax.evaluation.score import score

    examples = run.data.heldout("test", args.items)
    tasks = np.array([example.task_id for example in examples])
    sums = score(run, examples, base=base, phases=Phases())
    each = {t: float(sums.nll[tasks == t].sum() / sums.tokens[tasks == t].sum()) for t in np.unique(tasks)}
    return {"nll": {run.data.task_names[t]: value for t, value in each.items()}, "items": len(examples)}


def run(argv):
    _, args = flags.parse(__doc__, FLAGS, argv, need_config=False)
    from molora_jax import runtime

    runtime.configure()
    out = HERE / "results.json"
    results = kept(out, steps=args.steps, items=args.items)
    for when in (before, after) if args.steps else (before,):
        for form in args.forms.split(","):
            name = f"{form}, {when.__name__}"
            if name not in results["runs"]:
                results["runs"][name] = when(form, args)
                write_atomically(out, json.dumps(results, indent=1) + "\n")
    print(text(results["runs"]))


def text(runs: dict) -> str:
    tasks = list(next(iter(runs.values()))["nll"])
    rows = [("NLL", *runs)]
    rows += [(task, *(f"{found['nll'][task]:.4f}" for found in runs.values())) for task in tasks]
    rows.append(("mean", *(f"{np.mean(list(found['nll'].values())):.4f}" for found in runs.values())))
    return table(rows, right=tuple(range(1, len(rows[0]))))


if __name__ == "__main__":
    flags.main(run)
