"""What the papers of the low-rank methods claim, each in a few rows: the small experiments of their specifications.

python -m experiments.factors [--parts=nola,...] [--steps=300] [--seeds=3] [--workdir=runs/factors]

A small decoder that knows some prose learns three tasks at once. `nola`: fewer numbers than LoRA of rank 1. `randlora`:
the rank of the change. `lora_pro`: the distance to full fine-tuning. `allora`: how B A grows. `dylora`: one run cut to
several ranks. `baselines`: DoRA, LoRA-FA, AdaLoRA, VeRA, (IA)3. LoRA-GA, LoRA-SB and LoRA-XS stand in
experiments/starts, FFA-LoRA in experiments/federated. A part's seed is kept once it is whole, and so are its finished
runs. Writes results.json and results.png beside this file.
"""

import dataclasses
import json
import pathlib

import numpy as np

from experiments import small_base
from experiments.factors.parts import EVERY_SITE, PARTS, RATE
from experiments.routed import small
from experiments.words import kept
from launch import flags
from molora_jax import config as schema
from molora_jax.io.files import write_atomically
from molora_jax.pictures import figure, save, shades

HERE = pathlib.Path(__file__).parent
FLAGS = [
    ("--parts", dict(default=",".join(PARTS), help="which of them")),
    ("--steps", dict(type=int, default=300, help="optimizer steps of a row that has no number of its own")),
    ("--seeds", dict(type=int, default=3)),
    ("--workdir", dict(default="runs/factors", metavar="DIR")),
    ("--out", dict(default=str(HERE), metavar="DIR", help="where results.json is")),
]


@dataclasses.dataclass
class Ask:
    """Trains a row on the base `source`; called with an adapter, or None for full fine-tuning."""

    source: str
    workdir: pathlib.Path
    seed: int
    steps: int
    rows: int = 0
    trained: int = 0  # numbers that the row before trains

    def made(self, adapter, *, sites=EVERY_SITE, rate=RATE, steps=0, optim=(), losses=(), **train):
        made = small.config_of(self.source, small.NEW, steps or self.steps, self.seed, rate)
        if adapter is None:
            made.method.train_base = "all"
        else:
            made.method.rules = small.rules(sites, adapter=adapter)
        made.optim = dict(made.optim, **dict(optim))
        made.losses = dict(losses)
        made.train.update(train)
        return made

    def __call__(self, adapter, **more):
        from molora_jax.evaluation.run import load_run
        from molora_jax.training.loop import train

        self.rows += 1
        made, folder, lines = self.made(adapter, **more), str(self.workdir / f"{self.rows:02}-{self.seed}"), []
        schema.validate(made)
        train(made, folder, note=lines.append)
        self.trained = small_base.count_of(lines)
        return load_run(folder, "latest", config=made)

    def base(self):
        """The base alone, opened."""
        from molora_jax.evaluation.run import load_base_run

        return load_base_run(self.made(dict(name="lora", rank=1, alpha=1.0)))


def main(argv):
    _, args = flags.parse(__doc__, FLAGS, argv, need_config=False)
    from molora_jax import runtime

    runtime.configure()
    workdir, path = pathlib.Path(args.workdir), pathlib.Path(args.out) / "results.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    found = kept(path, steps=args.steps)
    source = small.base(workdir)
    for part in args.parts.split(","):
        for seed in range(args.seeds):
            if f"{part} | seed {seed}" in found["runs"]:
                continue
            ask, rows = Ask(source, workdir / part, seed, args.steps), {}
            for row, numbers in PARTS[part](ask):
                rows[row] = numbers | {"trained": ask.trained}
                print(f"{part}, seed {seed}: {row:36} {told(rows[row])}", flush=True)
            found["runs"][f"{part} | seed {seed}"] = rows
            write_atomically(path, json.dumps(found, indent=1) + "\n")
    report(found, path.parent)
    return 0


def told(numbers: dict) -> str:
    """A row's numbers in a line; of several the mean, or the first and the last."""
    parts = []
    for name, value in numbers.items():
        if name == "NLL":
            value = f"{np.mean(list(value.values())):.3f}"
        elif isinstance(value, dict):
            first, *_, last = value.values()
            value = f"{first:.3f} to {last:.3f}"
        parts.append(
            f"{name} {value:,}"
            if isinstance(value, int)
            else f"{name} {value if isinstance(value, str) else f'{value:.4g}'}"
        )
    return ", ".join(parts)


def seeds_of(found, part) -> list[dict]:
    return [rows for key, rows in found["runs"].items() if key.startswith(f"{part} |")]


def report(found, out):
    """A table a part, seeds side by side, and the picture of the two parts that are curves."""
    for part in PARTS:
        each = seeds_of(found, part)
        for row in each[0] if each else ():
            print(f"{part:10} {row:36} " + " | ".join(told(rows[row]) for rows in each if row in rows))
    fig, (left, right) = figure(1, 2, figsize=(9, 3.6), layout="constrained")
    curves(left, {row: [rows[row]["mean norm of a row of B A"] for rows in seeds_of(found, "allora")]
                  for row in ("LoRA, SGD, rate 1", "ALLoRA, SGD, eta 2, rate 0.5")})  # fmt: skip
    left.set(title="ALLoRA", xlabel="step", ylabel="mean norm of a row of B A")
    cut = {}
    for name in ("LoRA, R = 8", "DyLoRA, R = 8"):
        cut[name] = [
            {row.rpartition(" ")[2]: np.mean(list(value["NLL"].values())) for row, value in rows.items()
             if row.startswith(f"{name}, cut")}
            for rows in seeds_of(found, "dylora")
        ]  # fmt: skip
    curves(right, cut)
    right.set(title="DyLoRA", xlabel="components kept, of 8", ylabel="held-out NLL (nats a token)")
    print(save(fig, out / "results.png"))


def curves(ax, rows: dict):
    """One line a seed."""
    for colour, (name, runs) in zip(shades(len(rows)), rows.items(), strict=True):
        for number, run in enumerate(runs):
            ax.plot([int(x) for x in run], list(run.values()), "o-", ms=3, color=colour, label=None if number else name)
    ax.grid(alpha=0.3)
    ax.legend(frameon=False, fontsize=8)


if __name__ == "__main__":
    flags.main(main)
