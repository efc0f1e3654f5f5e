"""Where low-rank factors start: LoRA-SB against LoRA-XS and random outer factors, LoRA-GA against LoRA.

python -m experiments.starts [--steps=300] [--seeds=2] [--workdir=runs/starts]

A decoder of four layers (width 64, bytes) is trained whole on prose, which gives a base that knows something, and is
then adapted to inflections, arithmetic and code by each method. Finished runs are kept. Writes results.json and
results.png beside this file.
"""

import json
import pathlib

from configs import common
from experiments import small_base
from experiments.small_base import config_of
from experiments.words import kept
from launch import flags
from molora_jax import config as schema
from molora_jax.io.files import write_atomically
from molora_jax.pictures import figure, save, shades

HERE = pathlib.Path(__file__).parent
FLAGS = [
    ("--steps", dict(type=int, default=300, help="optimizer steps of each method")),
    ("--seeds", dict(type=int, default=2)),
    ("--workdir", dict(default="runs/starts", metavar="DIR")),
]
PROSE, NEW, FIRST = "factbook,topic,dialog,translate", "morph,math,code", 1200  # FIRST: steps on prose
SITES, EVERY = f"{common.ATTENTION},{common.FFN}", 20
CORE = dict(name="lora_xs", rank=16, alpha=16.0)
METHODS = {  # name -> (adapter, learning rate)
    "LoRA-SB, R = 16": (CORE | dict(init=dict(name="lora_sb", eta=1e-3, batches=8)), 4e-3),
    "LoRA-XS, R = 16": (CORE | dict(init="lora_xs"), 4e-3),
    "random outer factors, R = 16": (CORE | dict(init="orthonormal"), 4e-3),
    "LoRA, R = 4": (dict(name="lora", rank=4, alpha=8.0), 4e-3),
    "LoRA-GA, R = 8": (dict(name="rslora", rank=8, alpha=16.0, init=dict(name="lora_ga", gamma=16.0)), 1e-3),
    "LoRA, R = 8": (dict(name="rslora", rank=8, alpha=16.0), 1e-3),
}


def first_base(workdir) -> str:
    """The base that is trained whole on prose."""
    return small_base.first_base(workdir, config_of("random:tiny", PROSE, FIRST, 0, 2e-3))


def measured(workdir, made) -> dict:
    """Held-out NLL every EVERY steps, and how many numbers train."""
    from molora_jax.training.loop import train

    with made.unlocked():
        made.train.eval_every = EVERY
    schema.validate(made)
    told = []
    train(made, str(workdir), note=told.append)
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {
        "valid_nll": {str(row["step"]): row["valid_nll"] for row in rows if "valid_nll" in row},
        "first_loss": rows[0]["loss"], "trained": small_base.count_of(told),
    }  # fmt: skip


def main(argv):
    _, args = flags.parse(__doc__, FLAGS, argv, need_config=False)
    from molora_jax import runtime

    runtime.configure()
    workdir, path = pathlib.Path(args.workdir), HERE / "results.json"
    found, source = kept(path, steps=args.steps), first_base(workdir)
    for seed in range(args.seeds):
        for number, (name, (adapter, rate)) in enumerate(METHODS.items()):
            key = f"{name} | seed {seed}"
            if key in found["runs"]:
                continue
            made = config_of(source, NEW, args.steps, seed, rate)
            made.method.rules = dict(all=common.rule(SITES, adapter=common.adapter(**adapter, dropout=0.0)))
            found["runs"][key] = measured(workdir / f"{number}-{seed}", made)
            write_atomically(path, json.dumps(found, indent=1) + "\n")
    report(found)
    return 0


def report(found):
    """A line a method, and held-out NLL over steps, one line a run."""
    fig, axes = figure(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
    names = list(METHODS)
    for ax, group in zip(axes, (names[:4], names[4:]), strict=True):
        for colour, name in zip(shades(len(group)), group, strict=True):
            runs = [run for key, run in found["runs"].items() if key.startswith(f"{name} |")]
            for number, run in enumerate(runs):
                steps, values = [int(step) for step in run["valid_nll"]], list(run["valid_nll"].values())
                ax.plot(steps, values, color=colour, label=name if number == 0 else None)
            told = {
                step: [f"{run['valid_nll'][str(step)]:.3f}" for run in runs]
                for step in (100, found["setting"]["steps"])
            }
            text = "; ".join(f"after {step} steps {' '.join(values)}" for step, values in told.items())
            print(f"{name:30} {runs[0]['trained']:6,} trained, NLL {text}")
        ax.set(xlabel="step")
        ax.grid(alpha=0.3)
        ax.legend(frameon=False, fontsize=8)
    axes[0].set(ylabel="held-out NLL (nats a token)")
    print(save(fig, HERE / "results.png"))


if __name__ == "__main__":
    flags.main(main)
