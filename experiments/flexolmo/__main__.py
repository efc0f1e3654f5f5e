"""FlexOlmo on a small decoder: three owners train apart, are joined without a step, and each is left out.

python -m experiments.flexolmo [--steps=150] [--seeds=2] [--items=64] [--workdir=runs/flexolmo]

The public base is that of experiments/starts (four layers, trained whole on prose); owners have inflections, arithmetic
and code. Beside the join: each owner's expert alone, plain LoRAs of the same shape averaged and as an ensemble of their
outputs, rows that start at random, and plain LoRAs joined by documents. Finished runs are kept. Writes results.json and
results.png to --out.
"""

import functools
import json
import pathlib

import jax
import numpy as np

from configs import common, flexolmo
from experiments.small_base import config_of
from experiments.starts.__main__ import PROSE, first_base
from experiments.words import kept
from launch import flags
from molora_jax import config as schema
from molora_jax.io.files import write_atomically
from molora_jax.pictures import figure, save
from molora_jax.text import table

FLAGS = [
    ("--steps", dict(type=int, default=150, help="optimizer steps of each owner")),
    ("--seeds", dict(type=int, default=2)),
    ("--items", dict(type=int, default=64, help="held-out items a task")),
    ("--workdir", dict(default="runs/flexolmo", metavar="DIR")),
    ("--out", dict(default="experiments/flexolmo", metavar="DIR", help="of the results")),
]
DOMAINS, PUBLIC, RATE, RANK = ("morph", "math", "code"), tuple(PROSE.split(",")), 4e-3, 8


def owner(source, seed, steps, owners=DOMAINS, **options):
    """The shipped config on the small base."""
    made = config_of(source, "", steps, seed, RATE)
    shipped = flexolmo.get_config(owners=owners, public=PUBLIC, **options)
    made.data.tasks, made.method, made.losses = shipped.data.tasks, shipped.method, shipped.losses
    made.schedule = shipped.schedule
    made.method.rules.ffn.adapter.update(rank=RANK, alpha=2.0 * RANK, dropout=0.0)
    return made


def plain(source, seed, steps, domain):
    """A LoRA of the same shape, without a router."""
    made = config_of(source, domain, steps, seed, RATE)
    adapter = common.adapter(rank=RANK, alpha=2.0 * RANK, dropout=0.0)
    made.method.rules = dict(ffn=common.rule(common.FFN, adapter=adapter))
    return made


def trained(workdir, made) -> str:
    from molora_jax.training.loop import train

    schema.validate(made)
    if not (workdir / "checkpoints" / str(made.train.steps)).is_dir():
        train(made, str(workdir))
    return str(workdir)


def at_random(workdir, like, seed, number) -> str:
    """A run at step 0 whose row is random, of the length that the row of documents has, r_0 the same for all owners."""
    import molora_jax as mj

    if not (workdir / "config.json").is_file():
        run = mj.load_run(like)
        fresh = jax.jit(lambda p: run.model.init_adapters(jax.random.key(100 + 10 * seed + number), p))
        start = mj.load_run(like).view()  # r_0 never moved: its length is that of a mean of documents
        run.adapters = jax.device_get(fresh(run.params))
        view, rng = run.view(), {"W": np.random.default_rng([seed, number]), "r0": np.random.default_rng([seed, 99])}
        drawn = {}
        for key in view:
            if key.leaf in rng:
                length = np.linalg.norm(start[key._replace(leaf="r0")])
                row = drawn.setdefault(key.leaf, rng[key.leaf].standard_normal(view[key].shape))
                view[key] = (length * row / np.linalg.norm(row)).astype(np.float32)
        mj.write_run(workdir, run, view=view)
    return str(workdir)


class Items:
    """Held-out items of all domains and of the public tasks, and what runs say to them."""

    def __init__(self, source, items):
        from molora_jax.evaluation.run import load_base_run

        self.base = load_base_run(config_of(source, ",".join((*DOMAINS, *PUBLIC)), 1, 0, RATE))
        data, self.items = self.base.data, items
        self.examples, bound = data.heldout("test", items), data.train.targets_per_row
        self.batches = data.heldout_batches(self.examples, 8, targets_per_row=bound)
        self.names, self.tasks = data.task_names, np.array([e.task_id for e in self.examples])

    def nll(self, *runs) -> dict:
        """`{task: nats a token}` of the mean of the runs' probabilities; without runs of the base."""
        sums = np.zeros((2, len(self.examples)))
        for batch in self.batches:
            each = [_target(r.params, r.adapters, r.router_state, batch, model=r.model) for r in runs or (self.base,)]
            p = np.mean([np.exp(np.asarray(logp, np.float64)) for logp in each], axis=0)
            here = batch["loss_weight"] > 0
            for total, value in zip(sums, (-np.log(p), np.ones(p.shape)), strict=True):
                np.add.at(total, batch["example_index"][here], value[here])
        mean = lambda t: float(sums[0][self.tasks == t].sum() / sums[1][self.tasks == t].sum())  # noqa: E731
        out = {name: mean(t) for t, name in enumerate(self.names)}
        return {name: out[name] for name in DOMAINS} | {"public": float(np.mean([out[name] for name in PUBLIC]))}


def _target(params, adapters, state, batch, *, model):
    """`[B, S]`: log p of each position's target."""
    return _log_p(params, adapters, state, {k: v for k, v in batch.items() if k != "example_index"}, model=model)


@functools.partial(jax.jit, static_argnames="model")
def _log_p(params, adapters, state, batch, *, model):
    logits = model.logits(params, model.hidden(params, adapters, state, batch)[0])
    return jax.numpy.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], axis=-1)[..., 0]


def of_seed(folder, source, seed, steps, items) -> dict:
    """`{name: {domain: NLL}}`."""
    import molora_jax as mj
    from molora_jax.surgery.perform import perform

    owners = [trained(folder / f"owner/{d}", owner(source, seed, steps, (d,))) for d in DOMAINS]
    loras = [trained(folder / f"lora/{d}", plain(source, seed, steps, d)) for d in DOMAINS]
    blind = []
    for number, (domain, like) in enumerate(zip(DOMAINS, owners, strict=True)):
        made = owner(source, seed, steps, (domain,))
        made.train.init_from = at_random(folder / f"start/{domain}", like, seed, number)
        blind.append(trained(folder / f"random/{domain}", made))
    joins = {
        "FlexOlmo": owner(source, seed, 1, load=tuple(owners)),
        "random rows": owner(source, seed, 1, load=tuple(blind)),
        "plain LoRAs, rows of documents": owner(source, seed, 1, load=tuple(loras), documents=32),
    }
    made = {name: trained(folder / f"join-{i}", config) for i, (name, config) in enumerate(joins.items())}
    average = folder / "average"
    if not average.exists():
        merged = common.surgery("average", of="product")
        merged.surgery.inputs = tuple(loras)
        perform(merged, str(average))
    out = {"public base": items.nll()}
    out |= {f"owner of {d} alone": items.nll(mj.load_run(run)) for d, run in zip(DOMAINS, owners, strict=True)}
    out |= {name: items.nll(mj.load_run(run)) for name, run in made.items()}
    out |= {f"FlexOlmo without {d}": items.nll(mj.load_run(made["FlexOlmo"], without=d)) for d in DOMAINS}
    out["average of weights"] = items.nll(mj.load_run(average))
    out["ensemble of outputs"] = items.nll(*(mj.load_run(run) for run in loras))
    return out


def main(argv):
    _, args = flags.parse(__doc__, FLAGS, argv, need_config=False)
    from molora_jax import runtime

    runtime.configure()
    workdir, path = pathlib.Path(args.workdir).absolute(), pathlib.Path(args.out) / "results.json"
    found, source = kept(path, steps=args.steps, items=args.items), first_base(workdir)
    items = Items(source, args.items)
    for seed in range(args.seeds):
        if str(seed) not in found["runs"]:
            found["runs"][str(seed)] = of_seed(workdir / f"seed{seed}", source, seed, args.steps, items)
            write_atomically(path, json.dumps(found, indent=1) + "\n")
    report(found["runs"], path.with_suffix(".png"))
    return 0


def report(runs, picture):
    """A line a way, the seeds' mean; and how far each way is from the public base."""
    names, columns = list(next(iter(runs.values()))), (*DOMAINS, "public")
    value = lambda name, column: np.mean([run[name][column] for run in runs.values()])  # noqa: E731
    rows = [("", *columns, "mean of domains", "by seed")]
    for name in names:
        each = [np.mean([run[name][d] for d in DOMAINS]) for run in runs.values()]
        cells = [f"{value(name, column):.3f}" for column in columns]
        rows.append((name, *cells, f"{np.mean(each):.3f}", ", ".join(f"{x:.3f}" for x in each)))
    print(table(rows, right=(1, 2, 3, 4, 5)))
    fig, ax = figure(figsize=(8, 4.2), layout="constrained")
    places = np.arange(len(names))
    for i, column in enumerate(columns):
        change = [value(name, column) - value("public base", column) for name in names]
        ax.barh(places + 0.2 * i, change, 0.2, label=column)
    ax.set(yticks=places + 0.3, yticklabels=names, xlabel="held-out NLL less the public base's (nats a token)")
    ax.invert_yaxis()
    ax.grid(axis="x", alpha=0.3)
    ax.legend(frameon=False, fontsize=8)
    print(save(fig, picture))


if __name__ == "__main__":
    flags.main(main)
