"""Several LoRAs, one a task, merged without training: every surgery on the same runs and held-out items.

python -m experiments.merging --workdir=runs/merging [--tasks=morph,math,sentiment,topic] [--steps=30] [--items=16]
    [--config.base.source=random:tiny ...]

Trains a LoRA a task (in turn; the same command goes on), merges them in each way, measures all of them, and writes
results.json, results.md and results.png to --out. Fields of the training config may be overridden.
"""

import json
import pathlib
import sys

from experiments.merging import report
from launch import flags

FLAGS = [
    ("--workdir", dict(required=True, metavar="DIR", help="holds the runs")),
    ("--out", dict(default="experiments/merging", metavar="DIR", help="of the results")),
    ("--tasks", dict(default="morph,math,sentiment,topic", help="a LoRA each")),
    ("--steps", dict(type=int, default=30, help="of each LoRA")),
    ("--items", dict(type=int, default=16, help="held-out items a task")),
]
RANK = 4
WAYS = {  # name -> (surgery, options)
    "average of A and of B": ("average", {}),
    "average of B A": ("average", dict(of="product")),
    "sum of B A (task arithmetic)": ("task_arithmetic", {}),
    "half the sum of B A": ("task_arithmetic", dict(weights="0.5")),
    "TIES, density 0.5": ("ties", dict(density=0.5)),
    "LEGO, k = r": ("lora_lego", {}),
    "LEGO, k = r, norms off": ("lora_lego", dict(norm="off")),
    "LEGO, k = 2 r": ("lora_lego", dict(rank=2 * RANK)),
    "LEGO, k = 2 r, output off": ("lora_lego", dict(rank=2 * RANK, output=False)),
}


def defaults(args):
    """Plain LoRA on every projection, small enough for two cores."""
    config = flags.load("configs/lora.py")
    config.method.rules.all.adapter.update(rank=RANK, alpha=2.0 * RANK, dropout=0.0)
    config.data.update(seq_len=64)
    config.train.update(steps=args.steps, batch_size=4, save_every=10, keep=1)
    config.optim.update(learning_rate=2e-3, warmup=4)
    config.eval.update(num_items=args.items, num_generated=0, batch_size=8)
    return config


def run(argv):
    config, args = flags.parse(__doc__, FLAGS, argv, need_config=False, defaults=defaults)
    from molora_jax import runtime

    runtime.configure()
    folder, out, tasks = pathlib.Path(args.workdir), pathlib.Path(args.out), args.tasks.split(",")
    results = Results(out / "results.json", dict(tasks=tasks, steps=config.train.steps, items=args.items, rank=RANK))
    runs = [trained(config, folder / task, task, seed) for seed, task in enumerate(tasks)]
    results.score("base model", config, tasks, None)
    for task, one in zip(tasks, runs, strict=True):
        results.score(f"LoRA of {task}", config, tasks, one)
    for name, (surgery, options) in WAYS.items():
        results.score(name, config, tasks, merged(folder, surgery, options, runs))
    halved(folder, runs[0], tasks, config, results)
    report.write(out, results.tree)


def trained(config, workdir, task, seed):
    """One LoRA. Each has a start of its own: units of one start would be alike by their start, not by what they do."""
    import molora_jax as mj

    if (workdir / "checkpoints" / str(config.train.steps)).is_dir():
        return workdir  # trained before
    own = config.copy_and_resolve_references()
    with own.unlocked():
        own.data.tasks, own.seed = task, seed
    mj.train(own, str(workdir))
    return workdir


def merged(folder, surgery, options, runs):
    import molora_jax as mj
    from configs import common

    out = folder / "-".join([surgery, *(f"{k}={v}" for k, v in options.items()), str(len(runs))])
    if not out.exists():
        config = common.surgery(surgery, **options)
        config.surgery.inputs = tuple(map(str, runs))
        mj.perform(config, out, note=say)
    return out


def halved(folder, one, tasks, config, results):
    """A single LoRA brought to half its rank: its units clustered, and its first rows alone."""
    import molora_jax as mj

    half = RANK // 2
    results.score("halved: LEGO", config, tasks, merged(folder, "lora_lego", dict(rank=half), [one]))
    rows = folder / "first-rows"
    if not rows.exists():
        run = mj.load_run(one)
        view, changed = run.view(), run.config.copy_and_resolve_references()
        for key in view:
            view[key] = view[key][:, :half]
        with changed.unlocked():
            changed.method.rules.all.adapter.update(rank=half, alpha=2.0 * half)  # the scale stays 2
        mj.write_run(rows, run, view=view, config=changed)
    results.score(f"halved: first {half} rows", config, tasks, rows)


class Results:
    """`results.json`: what was asked, and `{name: {task: {nll, tokens, right: [an entry an item]}}}`."""

    def __init__(self, path, asked):
        self.path, self.tree = path, {"asked": asked, "scores": {}}
        if path.exists():
            old = json.loads(path.read_text(encoding="utf-8"))
            if old["asked"] == asked:
                self.tree = old

    def score(self, name, config, tasks, workdir):
        """Of the run in `workdir`, None: of the base alone."""
        from experiments.merging.measure import scored

        if name not in self.tree["scores"]:
            self.tree["scores"][name] = scored(config, tasks, workdir)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.tree) + "\n", encoding="utf-8")
        say(f"{name}: {report.mean_nll(self.tree['scores'][name]):.4f}")


def say(text):
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    flags.main(run)
