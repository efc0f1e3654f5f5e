"""Three tasks of real text, one after the other, on MiniLM with one LoRA and one head for all classes.

python -m experiments.continual [--seeds=3] [--steps=240] [--workdir=runs/continual]

    words      a word of VADER's lexicon: negative or positive
    language   a sentence of Django's catalogues: French, German or Spanish
    form       an inflected English word: plural, past, superlative

Each alone (`sequential`), with EWC, with a few replayed rows. Stop it whenever you like: finished runs are kept. Writes
results.json and results.png beside this file; each run has its own `report/continual.json` and picture.
"""

import importlib
import json
import pathlib

import numpy as np

from experiments.words import kept, words, write_rows
from launch import flags
from molora_jax import config as schema
from molora_jax.io.files import write_atomically
from molora_jax.pictures import figure, save, shades

HERE = pathlib.Path(__file__).parent
FLAGS = [
    ("--seeds", dict(type=int, default=3)),
    ("--steps", dict(type=int, default=240, help="optimizer steps, of all three tasks together")),
    ("--workdir", dict(default="runs/continual", metavar="DIR")),
]
EACH = 1200  # rows a task
VARIANTS = {
    "sequential": ("sequential_lora", {}, {}),
    "EWC, weight 3e3": ("ewc_lora", {}, dict(weight=3e3)),
    "EWC, weight 3e6": ("ewc_lora", {}, dict(weight=3e6)),
    "replay of 32 rows": ("sequential_lora", dict(replay=32, replay_share=0.3), {}),
}
ASKS = {"Plural of": "plural", "Past tense of": "past", "Superlative of": "superlative"}
LANGUAGES = ("French", "German", "Spanish")


def rows():
    from molora_jax.data.sources import morph, translate

    def cut(task, pairs):
        """The first EACH pairs in the order of a hash, so that no source's order counts."""
        pairs = sorted(set(pairs), key=lambda pair: hash_of(pair[0]))[:EACH]
        return [dict(text=text, label=label, task=task) for text, label in pairs]

    sentences = ((e.target, e.prompt.split()[2].rstrip(":")) for e in translate.examples(translate.files()))
    forms = ((e.target, ASKS[ask]) for e in morph.examples(morph.files()) for ask in ASKS if e.prompt.startswith(ask))
    return [
        *cut("words", words()),
        *cut("language", ((text, name) for text, name in sentences if name in LANGUAGES and len(text) < 60)),
        *cut("form", forms),
    ]


def hash_of(text):
    import hashlib

    return hashlib.sha256(text.encode()).hexdigest()


def config_of(which, regime, loss, *, seed, steps, data):
    from configs import common

    made = importlib.import_module(f"configs.{which}").get_config()
    made.seed, made.base.source = seed, "pkg:all-minilm-l6-v2"
    made.objective = dict(name="classify", pooling="mean")
    made.method.rules = dict(
        all=common.rule("q,k,v,o,up,down", adapter=common.adapter(rank=8, alpha=16.0, dropout=0.0))
    )
    made.data.update(tasks=data, seq_len=32, test_share=0.1)
    made.optim.update(learning_rate=2e-3, decay="constant", warmup=0)
    made.regime.update(dict(order="words,language,form") | regime)
    if loss:
        made.losses.ewc.update(loss)
    made.train.update(steps=steps, batch_size=8, save_every=0, log_every=30)
    made.eval.update(num_items=100)
    schema.validate(made)
    return made


def main(argv):
    _, args = flags.parse(__doc__, FLAGS, argv, need_config=False)
    from molora_jax import runtime

    runtime.configure()
    from molora_jax.training.loop import train

    work = pathlib.Path(args.workdir)
    work.mkdir(parents=True, exist_ok=True)
    data, path = write_rows(work / "rows.jsonl", rows()), HERE / "results.json"
    found = kept(path, steps=args.steps)
    for seed in range(args.seeds):
        for name, (which, regime, loss) in VARIANTS.items():
            key = f"{name} | seed {seed}"
            if key in found["runs"]:
                continue
            folder = work / f"{name.replace(', ', '-').replace(' ', '_')}-{seed}"
            train(config_of(which, regime, loss, seed=seed, steps=args.steps, data=data), str(folder))
            found["runs"][key] = json.loads((folder / "report" / "continual.json").read_text())
            write_atomically(path, json.dumps(found, indent=1) + "\n")
    report(found)
    return 0


def report(found):
    names = [n for n in VARIANTS if any(key.startswith(f"{n} |") for key in found["runs"])]
    fig, axes = figure(1, len(names), figsize=(3.6 * len(names), 3.6), layout="constrained", sharey=True, squeeze=False)
    for ax, name in zip(axes[0], names, strict=True):
        runs = [r for key, r in found["runs"].items() if key.startswith(f"{name} |")]
        a, tasks = 100 * np.array([run["accuracy"] for run in runs]), runs[0]["tasks"]
        for j, (task, colour) in enumerate(zip(tasks, shades(len(tasks)), strict=True)):
            for one in a:
                ax.plot(range(len(tasks)), one[:, j], color=colour, lw=0.8, alpha=0.5)
            ax.plot(range(len(tasks)), a[:, :, j].mean(0), "o-", color=colour, lw=2.2, label=task)
        told = {what: 100 * np.array([run[what] for run in runs]) for what in ("average_accuracy", "forgetting",
                                                                              "backward_transfer")}  # fmt: skip
        text = "  ".join(f"{what} {x.mean():+.1f} ({' '.join(f'{v:.1f}' for v in x)})" for what, x in told.items())
        print(f"{name:<18} {text}")
        ax.set(title=name, xticks=range(len(tasks)), xlabel="after training on", ylim=(0, 102))
        ax.set_xticklabels(tasks)
        ax.grid(alpha=0.3)
    axes[0, 0].set(ylabel="held-out accuracy (%)")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=len(tasks))
    print(save(fig, HERE / "results.png"))


if __name__ == "__main__":
    flags.main(main)
