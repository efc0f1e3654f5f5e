"""Four adapters trained apart, one model of all of them: do the gates tell the task, and change it inside one text?

python -m experiments.meteora [--seeds=1] [--steps=12] [--gate_steps=100] [--items=8] [--workdir=runs/meteora]

    single     each task's own LoRA of rank 8                        steps each; 3 x steps for answers of one letter
    multi      one LoRA of rank 32 on all four tasks                 as many as the four together
    meteora    the four adapters, frozen; gates and their loss       gate_steps
    no label   the same without the gates' loss                      gate_steps

Gates start small (`router.init=normal`): from N(0, 1) they want thousands of steps, as the paper's have.

Measured on words that no run saw: the share of answer tokens that are the likeliest one given all before, for single
tasks and for composites (three tasks' items in one text, in sequence); how often a gate's strongest adapter is that of
its token's task. SmolLM2-135M, plain text. Stop it whenever you like: finished runs are kept. Writes results.json and
results.png beside this file.
"""

import json
import pathlib

import numpy as np

from experiments import word_tasks
from experiments.words import kept
from launch import flags
from molora_jax import config as schema
from molora_jax.io.files import write_atomically
from molora_jax.pictures import figure, save

HERE = pathlib.Path(__file__).parent
FLAGS = [
    ("--seeds", dict(type=int, default=1)),
    ("--steps", dict(type=int, default=12, help="optimizer steps of each adapter")),
    ("--gate_steps", dict(type=int, default=100)),
    ("--items", dict(type=int, default=8, help="held-out words a task, and composites")),
    ("--workdir", dict(default="runs/meteora", metavar="DIR")),
]
RATE, GATE_RATE = 2e-3, 5e-3  # of the adapters; of the gates, ten times the paper's for a hundredth of its steps
EVEN = 15.0
TASKS = tuple(word_tasks.TASKS)
LONGER = {"ending": 3}  # a row has few answer tokens


def config_of(name, seed, args, entries, singles):
    """The run `name`; `singles`: folders of the tasks' own adapters."""
    from configs import common, meteora

    if name in ("meteora", "no label"):
        made = meteora.get_config(load=singles, tasks=",".join(entries.values()))
        made.method.rules["all"].router.init = "normal"
        made.optim.learning_rate = GATE_RATE
        if name == "no label":
            made.losses = {}
        tasks, steps = TASKS, args.gate_steps
    else:
        made = common.get_config()
        tasks, rank = ((name,), 8) if name in TASKS else (TASKS, 8 * len(TASKS))
        steps = args.steps * sum(LONGER.get(task, 1) for task in tasks)
        made.method.rules = dict(
            all=common.rule(
                f"{common.ATTENTION},{common.FFN}", adapter=common.adapter(rank=rank, alpha=2.0 * rank, dropout=0.0)
            )
        )
        made.optim.learning_rate = RATE
    word_tasks.data(made, [entries[task] for task in tasks])
    made.seed = seed
    made.optim.warmup = 3
    made.train.update(steps=steps, batch_size=4, save_every=0, log_every=5)
    made.eval.update(num_items=8, num_generated=0)
    schema.validate(made)
    return made


def measured(folder, held_out, items: int) -> dict:
    """`single {task: share}`, `composite` share; where there are gates `composite_even`, the share with the two chosen
    nearly even (the paper's T for three tasks), and `gates {kind of text: [L]}`, how many are right.
    """
    from molora_jax.evaluation.run import load_run

    run, out = load_run(folder, "latest"), {"single": {}}
    for task in TASKS:
        found = []
        for word in held_out[:items]:
            ids, first = word_tasks.pieces(run, task, word)
            found.append(word_tasks.right(run, ids, [(first, len(ids))]))
        out["single"][task] = float(np.mean(np.concatenate(found)))
    texts = composites(run, held_out, items)
    score = lambda run: float(np.mean(np.concatenate([word_tasks.right(run, *text[:2]) for text in texts])))  # noqa: E731
    out["composite"] = score(run)
    if run.model.rules[0].router is None:
        return out
    single = [(i % len(TASKS), word_tasks.pieces(run, TASKS[i % len(TASKS)], held_out[i])[0]) for i in range(items)]
    told_of = {
        "single": [told(run, ids, np.full(len(ids), task)) for task, ids in single],
        "composite": [told(run, ids, owner) for ids, _, owner in texts],
    }
    out["gates"] = {kind: np.concatenate(each, axis=-1).mean((0, 2)).tolist() for kind, each in told_of.items()}
    config = run.config.copy_and_resolve_references()
    with config.unlocked():
        config.method.rules["all"].router.temperature = EVEN
    return out | {"composite_even": score(load_run(folder, "latest", config=config))}


def composites(run, held_out, items: int) -> list:
    """Of each text three tasks' items, of other words and in other orders."""
    order = [[TASKS[(i + j) % len(TASKS)] for j in range(3)] for i in range(items)]
    return [composed(run, order[i], held_out[3 * i : 3 * i + 3]) for i in range(items)]


def composed(run, tasks, words):
    """`(ids, spans of the answers, the task of each id)` of several items, one a line."""
    ids, spans, owner = [], [], []
    for task, word in zip(tasks, words, strict=True):
        own, first = word_tasks.pieces(run, task, word)
        spans.append((len(ids) + first, len(ids) + len(own)))
        own = own + run.tokenizer.encode("\n")
        owner += [TASKS.index(task)] * len(own)
        ids += own
    return ids, spans, np.array(owner)


def told(run, ids, owner) -> np.ndarray:
    """`[sites, L, tokens]` bool: whether a gate's strongest adapter is its token's."""
    found = run.routing(run.tokenizer.decode(ids))["all"]
    gates = np.stack([found[site][:, : len(ids)] for site in run.model.config.sites])
    if gates.shape[2] != len(ids):
        raise ValueError("the text has other tokens when it is read as a whole")
    return gates.argmax(-1) == owner


def main(argv):
    _, args = flags.parse(__doc__, FLAGS, argv, need_config=False)
    from molora_jax import runtime

    runtime.configure()
    from molora_jax.training.loop import train

    work, path = pathlib.Path(args.workdir).absolute(), HERE / "results.json"
    entries, held_out = word_tasks.write(work)
    found = kept(path, steps=args.steps, gate_steps=args.gate_steps, items=args.items)
    for seed in range(args.seeds):
        folder = lambda name, seed=seed: work / f"{name.replace(' ', '_')}-{seed}"  # noqa: E731
        singles = tuple(str(folder(task)) for task in TASKS)
        for name in (*TASKS, "multi", "meteora", "no label"):
            key = f"{name} | seed {seed}"
            if key not in found["runs"]:
                train(config_of(name, seed, args, entries, singles), str(folder(name)))
                found["runs"][key] = measured(folder(name), held_out, args.items)
                write_atomically(path, json.dumps(found, indent=1) + "\n")
    report(found)
    return 0


def report(found):
    """The means over seeds, in words and as a picture: the gates by layer, the scores by task."""
    of = lambda name: [run for key, run in found["runs"].items() if key.startswith(f"{name} |")]  # noqa: E731
    scores = {"single": [np.mean([run["single"][task] for run in of(task)]) for task in TASKS]}
    for name in ("multi", "meteora", "no label"):
        scores[name] = [np.mean([run["single"][task] for run in of(name)]) for task in TASKS]
        scores[name].append(np.mean([run["composite"] for run in of(name)]))
    for name in ("meteora", "no label"):
        even = np.mean([run["composite_even"] for run in of(name)])
        print(f"{name}, composites with T = {EVEN:g}: {100 * even:.1f}")
    fig, (left, right) = figure(1, 2, figsize=(10, 3.6), layout="constrained")
    for name, colour in (("meteora", "tab:blue"), ("no label", "tab:orange")):
        for kind, style in (("single", "-"), ("composite", "--")):
            share = 100 * np.mean([run["gates"][kind] for run in of(name)], axis=0)
            left.plot(share, style, color=colour, label=f"{name}, {kind}")
            print(f"{name}, {kind}: gates right {share.mean():.1f} %, layers above 95 %: {(share > 95).sum()}")
    left.set(xlabel="layer", ylabel="gates with the token's adapter (%)", ylim=(0, 102))
    left.legend(frameon=False, fontsize=8)
    for i, (name, own) in enumerate(scores.items()):
        right.bar(np.arange(len(own)) + 0.2 * i - 0.3, 100 * np.array(own), 0.2, label=name)
        print(f"{name:<10}" + "".join(f"{100 * share:7.1f}" for share in own))
    right.set(xticks=range(5), ylabel="answer tokens right (%)", ylim=(0, 102))
    right.set_xticklabels([*TASKS, "three in one"])
    right.legend(frameon=False, fontsize=8)
    print(save(fig, HERE / "results.png"))


if __name__ == "__main__":
    flags.main(main)
