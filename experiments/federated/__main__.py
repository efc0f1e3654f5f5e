"""FFA-LoRA against FedIT on words of VADER's lexicon: three clients with skewed classes, with and without DP noise.

python -m experiments.federated [--seeds=3] [--turns=40] [--workdir=runs/federated]

Held-out loss after each round (split valid) and accuracy after the last (test), of the average of the clients; the same
data, seeds, clip and noise for both. Stop it whenever you like: finished runs are kept. Writes results.json and
results.png beside this file.
"""

import importlib
import json
import pathlib

import numpy as np

from experiments.words import held_out_accuracy, kept, write_words
from launch import flags
from molora_jax import config as schema
from molora_jax.io.files import write_atomically
from molora_jax.pictures import BASE, TUNED, figure, save

HERE = pathlib.Path(__file__).parent
FLAGS = [
    ("--seeds", dict(type=int, default=3)),
    ("--turns", dict(type=int, default=40, help="local steps of each client")),
    ("--workdir", dict(default="runs/federated", metavar="DIR")),
]
ROUND, CLIENTS = 5, 3
NOISE = dict(dp_clip=1.0, dp_epsilon=3.0)
METHODS = {"FedIT (A and B)": "fedit", "FFA-LoRA (B)": "ffa_lora"}


def settings():
    """`{name: (config, alpha, rate, regime options)}`: the comparison, then alpha at alpha^2 rate constant."""
    out = {}
    for name, config in METHODS.items():
        out[name] = (config, 8.0, 0.5, {})
        out[f"{name}, epsilon 3"] = (config, 8.0, 0.5, NOISE)
    return out


def config_of(which, alpha, rate, regime, *, seed, turns, data):
    made = importlib.import_module(f"configs.{which}").get_config()
    made.seed = seed
    made.data.update(tasks=data, seq_len=8, test_share=0.1, raw=False)
    made.method.rules.all.adapter.alpha = alpha
    made.optim.learning_rate = rate
    made.regime.update(dict(local_steps=ROUND, split="skew", skew=0.85, dp_clip=0.0, dp_epsilon=0.0) | regime)
    made.train.update(steps=CLIENTS * turns, batch_size=8, eval_every=CLIENTS * ROUND, save_every=0, log_every=300)
    schema.validate(made)
    return made


def main(argv):
    _, args = flags.parse(__doc__, FLAGS, argv, need_config=False)
    from molora_jax import runtime

    runtime.configure()
    from molora_jax.training.loop import train

    work = pathlib.Path(args.workdir)
    work.mkdir(parents=True, exist_ok=True)
    data = write_words(work / "words.jsonl")
    path = HERE / "results.json"
    found = kept(path, turns=args.turns)
    for name, (which, alpha, rate, regime) in settings().items():
        for seed in range(args.seeds):
            key = f"{name} | seed {seed}"
            if key in found["runs"]:
                continue
            made = config_of(which, alpha, rate, regime, seed=seed, turns=args.turns, data=data)
            folder = work / f"{which}-{'dp' if regime else 'plain'}-{seed}"
            train(made, str(folder))
            rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            found["runs"][key] = dict(
                accuracy=held_out_accuracy(folder, CLIENTS * args.turns),
                nll=[row["valid_nll"] for row in rows if "valid_nll" in row],
                bytes=rows[-1]["bytes_up"], epsilon=rows[-1].get("epsilon"),
            )  # fmt: skip
            write_atomically(path, json.dumps(found, indent=1) + "\n")
    report(found)
    return 0


def report(found):
    fig, axes = figure(1, 2, figsize=(10, 3.8), layout="constrained", sharey=True)
    for ax, suffix in zip(axes, ("", ", epsilon 3"), strict=True):
        for name, colour in zip(METHODS, (BASE, TUNED), strict=True):
            runs = [r for key, r in found["runs"].items() if key.split(" | ")[0] == name + suffix]
            curves = np.array([run["nll"] for run in runs])
            rounds = np.arange(1, curves.shape[1] + 1)
            for curve in curves:
                ax.plot(rounds, curve, color=colour, lw=0.8, alpha=0.5)
            ax.plot(rounds, curves.mean(0), color=colour, lw=2.5, label=name)
            last = 100 * np.array([run["accuracy"] for run in runs])
            std = last.std(ddof=1) if len(last) > 1 else 0.0
            half = {1: float("nan"), 2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}.get(len(last), 1.96) * std / len(last) ** 0.5
            told = f"{last.mean():.1f} % +- {half:.1f} (95 %), std {std:.2f}, {runs[0]['bytes']:,} bytes"
            print(f"{name + suffix:<28} {told}")
        ax.set(title="without noise" if not suffix else "DP-SGD, epsilon 3, delta 1e-5", xlabel="round")
        ax.grid(alpha=0.3)
    axes[0].set(ylabel="held-out loss (nats a word)")
    axes[0].legend(frameon=False)
    print(save(fig, HERE / "results.png"))


if __name__ == "__main__":
    flags.main(main)
