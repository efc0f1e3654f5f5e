"""LoRA-Mixer in the small: experts learnt by task, then a router from few samples, against one LoRA of all tasks.

python -m experiments.lora_mixer [--seeds=3] [--steps=600] [--workdir=runs/lora_mixer_small]

A decoder of four layers (width 64, bytes) is trained whole to copy what an instruction asks for, and is then adapted to
four other instructions on the same strings. Experts stand in the layers 1 to 3: what enters the first is a letter's
embedding, which knows no task. Finished runs are kept. Writes results.json, results.md and results.png to --out.
"""

import dataclasses
import json
import pathlib

import numpy as np

from configs import common, lora_mixer
from experiments.lora_mixer import report
from experiments.lora_mixer.tasks import BEFORE, TASKS, rows
from experiments.words import kept, write_rows
from launch import flags
from molora_jax import config as schema
from molora_jax.io.files import write_atomically

HERE = pathlib.Path(__file__).parent
FLAGS = [
    ("--seeds", dict(type=int, default=3)),
    ("--steps", dict(type=int, default=600, help="of the experts; the router has a third of it, one LoRA both")),
    ("--workdir", dict(default="runs/lora_mixer_small", metavar="DIR")),
    ("--out", dict(default=str(HERE), metavar="DIR", help="of the results")),
]
ROWS, FEW, FIRST = 1000, 50, 2500  # of each task: all, and 5 % of them; steps of the base
RANK, E, LAYERS = 8, len(TASKS), "1-3"
RATE, ROUTER_RATE = 4e-3, 1e-2
ROUTERS = {  # name -> (rows a task, entropy's sign, whether experts train too)
    "router, 5 % of the rows": (FEW, 1, False),
    "router, all rows": (ROWS, 1, False),
    "router and experts, 5 % of the rows": (FEW, 1, True),
    "router, 5 %, the printed sign": (FEW, -1, False),
    "router, 5 %, without the loss": (FEW, 0, False),
}


def config_of(source, files, steps, seed, rate=RATE):
    made = common.get_config()
    made.seed, made.base.source = seed, source
    made.data.update(tasks=",".join(files), seq_len=64, raw=True)
    made.optim.update(learning_rate=rate, warmup=10)
    made.train.update(steps=steps, batch_size=16, save_every=0, log_every=100)
    made.eval.update(num_items=64, num_generated=0)
    return made


def trained(made, workdir):
    from molora_jax.training.loop import train

    if not (workdir / "checkpoints" / str(made.train.steps)).is_dir():
        schema.validate(made)
        train(made, str(workdir), note=lambda text: None)
    return workdir


def first_base(workdir) -> str:
    """A base that can copy: trained whole, its leaves written as a model of their own."""
    from molora_jax.surgery.perform import perform

    out = workdir / "copies"
    if not (out / "base" / "config.json").is_file():
        files = [write_rows(workdir / f"{name}.jsonl", rows(name, 2 * ROWS, 99)) for name in BEFORE]
        made = config_of("random:tiny", files, FIRST, 0, 2e-3)
        made.method.train_base = "all"
        merged = common.surgery("merge_into_base")
        merged.surgery.inputs = (str(trained(made, workdir / "whole")),)
        perform(merged, str(out))
    return f"dir:{out / 'base'}"


def rule(router=True, rank=RANK):
    adapter = common.adapter(rank=rank, alpha=2.0 * rank, dropout=0.0)
    if not router:
        return dict(mix=common.rule(common.ATTENTION, layers=LAYERS, adapter=adapter))
    soft = dict(lora_mixer.get_config().method.rules.mix.router)
    return dict(mix=common.rule(common.ATTENTION, layers=LAYERS, experts=str(E), adapter=adapter, router=soft))


def runs_of(source, workdir, steps, seed) -> dict:
    """The runs of one seed, by name: experts by task, one LoRA, the routers."""
    folders = {}
    for count in (ROWS, FEW):  # the few are the first of all
        folder = workdir / f"rows{count}-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        folders[count] = [write_rows(folder / f"{name}.jsonl", rows(name, ROWS, seed)[:count]) for name in TASKS]
    made = config_of(source, folders[ROWS], steps, seed)
    made.method.rules = rule()
    made.schedule.s00.update(route="task", freeze="*/router/*")
    found = {"experts": trained(made, workdir / f"experts-{seed}")}
    made = config_of(source, folders[ROWS], steps + steps // 3, seed)
    made.method.rules = rule(router=False, rank=E * RANK)
    found["one LoRA"] = trained(made, workdir / f"one-{seed}")
    for number, (name, (count, sign, joint)) in enumerate(ROUTERS.items()):
        made = config_of(source, folders[count], steps // 3, seed, RATE / 4 if joint else ROUTER_RATE)
        made.method.rules = rule()
        if sign:
            made.losses = dict(specialisation=dict(weight=0.1, lam=0.5, entropy_sign=sign))
        if joint:
            made.losses.preservation = dict(weight=1e-2)
        else:
            made.schedule.s00.freeze = "*/A,*/B"
        made.train.init_from = str(found["experts"])
        found[name] = trained(made, workdir / f"router{number}-{seed}")
    return found


def measured(run, data, **changes) -> dict:
    """On held-out rows of `data`: accuracy of answer tokens, whole answers and NLL by task, and the gates of each task.

    `changes`: fields of the router (`hard`, `k`), or the model's `route`.
    """
    from molora_jax import sharding
    from molora_jax.objectives.held_out import example_nll

    model, route = run.model, changes.pop("route", "")
    if model.rules and model.rules[0].router is not None:
        router = dataclasses.replace(model.rules[0].router, **changes)
        model = dataclasses.replace(model, rules=(dataclasses.replace(model.rules[0], router=router),), route=route)
    examples, bound = data.heldout("test", 64), data.train.targets_per_row
    sums = example_nll(
        model, run.params, run.adapters, run.router_state, data.heldout_batches(examples, 16, targets_per_row=bound),
        len(examples), mesh=run.mesh, targets_per_row=bound, constrain=sharding.constrain(run.mesh), num_tasks=E,
    )  # fmt: skip
    ids, right, tokens = np.array([example.task_id for example in examples]), sums["right"], sums["tokens"]
    of = lambda value: [round(float(value[ids == i].sum()), 5) for i in range(E)]  # noqa: E731
    out = dict(right=of(right), tokens=of(tokens), whole=of(right == tokens), items=of(tokens > 0), nll=of(sums["nll"]))
    gates = sums["gates"].get("mix", {}).get("attn")
    if gates is not None:
        gates = gates[:, [count > 0 for count in model.rules[0].experts]]
        out["gates"] = (gates / gates.sum(axis=-1, keepdims=True)).round(4).tolist()  # [tasks, layers, E]
    return out


def main(argv):
    _, args = flags.parse(__doc__, FLAGS, argv, need_config=False)
    from molora_jax import runtime
    from molora_jax.evaluation.run import load_base_run, load_run

    runtime.configure()
    workdir, out = pathlib.Path(args.workdir), pathlib.Path(args.out)
    workdir.mkdir(parents=True, exist_ok=True)
    found, source = kept(out / "results.json", steps=args.steps), first_base(workdir)
    for seed in range(args.seeds):
        if str(seed) in found["runs"]:
            continue
        folders = runs_of(source, workdir, args.steps, seed)
        experts = load_run(folders["experts"], "latest")
        scores = {"base": measured(load_base_run(experts.config), experts.data)}
        scores["each task by its own expert"] = measured(experts, experts.data, route="task")
        scores["one LoRA"] = measured(load_run(folders["one LoRA"], "latest"), experts.data)
        for name in ROUTERS:
            run = load_run(folders[name], "latest")
            for form, changes in report.FORMS.items():
                scores[f"{name} | {form}"] = measured(run, experts.data, **changes)
        found["runs"][str(seed)] = scores
        write_atomically(out / "results.json", json.dumps(found, indent=1) + "\n")
    print(report.write(out, found))
    return 0


if __name__ == "__main__":
    flags.main(main)
