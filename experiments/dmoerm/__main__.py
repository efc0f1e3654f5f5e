"""Rewards from noisy preferences: one model, one a category, and DMoERM; and how far best-of-N can be pushed on each.

python -m experiments.dmoerm [--steps=240] [--seeds=1] [--workdir=runs/dmoerm-experiment]

Synthetic: three categories weight three attributes of an answer (length, keywords, politeness) differently; 30 % of the
labels are flipped. DMoERM has labels of single attributes beside them. All on random:tiny, with equal numbers of steps.
Finished runs are kept. Writes results.json and results.png beside this file.
"""

import json
import pathlib
import random

import numpy as np

from configs import common, dmoerm
from experiments.words import kept, write_rows
from launch import flags
from molora_jax import config as schema
from molora_jax.io.files import write_atomically
from molora_jax.pictures import figure, save, shades

HERE = pathlib.Path(__file__).parent
FLAGS = [
    ("--steps", dict(type=int, default=240, help="optimizer steps of each reward model")),
    ("--seeds", dict(type=int, default=1)),
    ("--workdir", dict(default="runs/dmoerm-experiment", metavar="DIR")),
]
WEIGHTS = dict(  # of length, keywords, politeness: what each category is about
    story=(1.0, 0.0, -0.5), advice=(0.0, 0.3, 1.0), fact=(-0.7, 1.0, 0.0)
)
ATTRIBUTES = dict(length="a", keyword="k", polite="p")  # attribute -> its letter
MOST, WIDER = 4, 8  # of each attribute in the pairs; in the candidates of best-of-N
FLIPPED, PAIRS, POINT_PAIRS, HELD_OUT, PROMPTS = 0.3, 400, 250, 150, 8  # a category (or point)
CANDIDATES = (1, 2, 4, 8, 16, 32, 64)
POINTS = tuple(f"{c}:{c}.{a}" for c in WEIGHTS for a in ATTRIBUTES)
RATE, OUTER_STEPS = 2e-3, 60
MODELS = ("single", "mean of 3 singles", "a category each", "DMoERM")


def answer(draw, most: int) -> str:
    letters = [letter for letter in ATTRIBUTES.values() for _ in range(draw.randint(0, most))] or ["a"]
    draw.shuffle(letters)
    return "".join(letters)


def counts(text: str) -> np.ndarray:
    return np.array([text.count(letter) for letter in ATTRIBUTES.values()], float)


def gold(category: str, text: str) -> float:
    return float(counts(text) @ WEIGHTS[category])


def make_rows(seed: int) -> dict:
    """Noisy pairs of categories, labels of attributes by a judge that is asked twice, clean pairs, prompts."""
    from molora_jax.data.pairs import judged, of_ranking

    draw, out = random.Random(seed), dict(category=[], point=[], clean=[], prompts=[])
    number = iter(range(10**6))
    for category in WEIGHTS:
        asked = lambda c=category: f"{c} {next(number)}"  # noqa: E731
        pair = lambda: (answer(draw, MOST), answer(draw, MOST))  # noqa: E731

        def clean(n, pair=pair, asked=asked, category=category):
            found = []
            while len(found) < n:
                prompt, two = asked(), pair()
                value = [gold(category, text) for text in two]
                found += of_ranking(prompt, two, [1 + (v < max(value)) for v in value])
            return found

        for row in clean(PAIRS):
            if draw.random() < FLIPPED:
                row = row | dict(chosen=row["rejected"], rejected=row["chosen"])
            out["category"].append(row | dict(task=category))
        out["clean"] += [row | dict(task=category) for row in clean(HELD_OUT)]
        for a, attribute in enumerate(ATTRIBUTES):
            judge = lambda _, first, second, a=a: 1 if counts(first)[a] > counts(second)[a] else 2  # noqa: E731
            rows = judged([(asked(), *pair()) for _ in range(POINT_PAIRS)], judge)
            out["point"] += [row | dict(task=f"{category}.{attribute}") for row in rows]
        out["prompts"] += [dict(task=category, prompt=asked()) for _ in range(PROMPTS)]
    return out


def shared(made, seed: int, steps: int):
    made.seed, made.base.source = seed, "random:tiny"
    made.data.update(seq_len=128, test_share=0.0)
    made.train.update(steps=steps, batch_size=16, save_every=0, eval_every=0, log_every=80)
    made.eval.update(batch_size=64)
    made.optim.update(warmup=10, decay="cosine")
    return made


def single(files, seed, steps):
    """One reward head and one LoRA for all categories."""
    made = shared(common.get_config(), seed, steps)
    made.objective = dict(name="preference", form="reward")
    made.data.tasks = files["category"]
    made.optim.learning_rate = RATE
    made.method.rules = dict(
        all=common.rule(f"{common.ATTENTION},{common.FFN}", adapter=common.adapter(rank=16, alpha=32.0))
    )
    return made


def fused(files, seed, steps, *, phases=("s00", "s01", "s02")):
    """DMoERM, or its first phase alone on all rows."""
    made = shared(dmoerm.get_config(POINTS, f"{files['category']},{files['point']}"), seed, steps)
    schedule = {name: made.schedule[name] for name in phases}
    for stage in schedule.values():
        stage["set"].optim.learning_rate = RATE
        stage.rows = "" if len(phases) == 1 else stage.rows
    with made.unlocked():
        made.schedule = schedule
        made.objective = next(iter(schedule.values())).objective if len(phases) == 1 else made.objective
    return made


def outer(files, seed):
    """The outer router: which category a prompt is of."""
    made = shared(common.get_config(), seed, OUTER_STEPS)
    made.objective = dict(name="classify", pooling="last")
    made.data.update(tasks=files["outer"], test_share=0.1)
    made.optim.learning_rate = RATE
    made.method.rules = dict(all=common.rule("q,v", adapter=common.adapter(rank=8, alpha=16.0)))
    return made


def opened(folder, made):
    """The finished run in a folder, trained first where it is not there."""
    from molora_jax.evaluation.run import load_run
    from molora_jax.training.loop import train

    schema.validate(made)
    result = train(made, str(folder))
    if result.step < made.train.steps:
        raise SystemExit(f"stopped at step {result.step}: the same command goes on")
    return load_run(folder)


def measured(workdir, seed: int, steps: int) -> dict:
    from molora_jax.evaluation.rewards import best_of, categories, rewards

    workdir.mkdir(parents=True, exist_ok=True)
    rows = make_rows(seed)
    files = {kind: write_rows(workdir / f"{kind}.jsonl", rows[kind]) for kind in ("category", "point")}
    outer_rows = [dict(text=row["prompt"], label=row["task"]) for row in rows["category"]]
    files["outer"] = write_rows(workdir / "outer.jsonl", outer_rows)
    router = opened(workdir / "outer", outer(files, seed))
    singles = [opened(workdir / f"single-{i}", single(files, seed + 100 * i, steps)) for i in range(3)]
    by_category = opened(workdir / "category", fused(files, seed, steps, phases=("s00",)))
    whole = opened(workdir / "dmoerm", fused(files, seed, steps))

    draw = random.Random(seed + 1)
    candidates = [(row, answer(draw, WIDER)) for row in rows["prompts"] for _ in range(CANDIDATES[-1])]
    prompts = [row["prompt"] for row in rows["clean"]] * 2 + [row["prompt"] for row, _ in candidates]
    answers = [row[side] for side in ("chosen", "rejected") for row in rows["clean"]] + [a for _, a in candidates]
    truth = [row["task"] for row in rows["clean"]] * 2 + [row["task"] for row, _ in candidates]
    unique = list(dict.fromkeys(prompts))
    of_prompt = dict(zip(unique, categories(router, unique), strict=True))
    tasks = [of_prompt[prompt] for prompt in prompts]  # the outer router's, not the truth

    each = [rewards(run, prompts, answers) for run in singles]
    scale = lambda r: (r - r.mean()) / r.std()  # noqa: E731
    found = {"single": each[0], "mean of 3 singles": np.mean([scale(r) for r in each], axis=0)}
    found |= {
        name: rewards(run, prompts, answers, tasks) for name, run in zip(MODELS[2:], (by_category, whole), strict=True)
    }
    n = len(rows["clean"])
    value = np.array([gold(row["task"], text) for row, text in candidates]).reshape(-1, CANDIDATES[-1])
    spread = value.std()
    out = {"outer": float(np.mean([a == b for a, b in zip(tasks, truth, strict=True)]))}
    curve = lambda r: [  # noqa: E731  (gold of the best of n, in deviations of a candidate from the mean one)
        float(((np.take_along_axis(value, best_of(r, k)[:, None], 1)[:, 0] - value.mean()) / spread).mean())
        for k in CANDIDATES
    ]
    for name, r in found.items():
        own = r[2 * n :].reshape(value.shape)
        out[name] = {"accuracy": float(np.mean(r[:n] > r[n : 2 * n])), "gold": curve(own)}
    out["gold itself"] = {"gold": curve(value)}
    return out


def main(argv):
    _, args = flags.parse(__doc__, FLAGS, argv, need_config=False)
    from molora_jax import runtime

    runtime.configure()
    path = HERE / "results.json"
    found = kept(path, steps=args.steps)
    for seed in range(args.seeds):
        if str(seed) not in found["runs"]:
            found["runs"][str(seed)] = measured(pathlib.Path(args.workdir) / str(seed), seed, args.steps)
            write_atomically(path, json.dumps(found, indent=1) + "\n")
    report(found)
    return 0


def report(found):
    """A line a model; gold over N."""
    fig, ax = figure(1, 1, figsize=(5.5, 3.6), layout="constrained")
    runs = list(found["runs"].values())
    for colour, name in zip(shades(len(MODELS) + 1), (*MODELS, "gold itself"), strict=True):
        mean = np.mean([run[name]["gold"] for run in runs], axis=0)
        ax.plot(CANDIDATES, mean, "o-", color=colour, label=name)
        accuracy = " ".join(f"{run[name]['accuracy']:.1%}" for run in runs if "accuracy" in run[name])
        print(f"{name:18} accuracy {accuracy or '-':14} gold {' '.join(f'{g:5.2f}' for g in mean)}")
    print("outer router", " ".join(f"{run['outer']:.1%}" for run in runs))
    ax.set(xscale="log", xlabel="N of best-of-N", ylabel="gold (deviations above the mean)")
    ax.set_xticks(CANDIDATES, CANDIDATES)
    ax.legend(frameon=False, fontsize=8)
    print(save(fig, HERE / "results.png"))


if __name__ == "__main__":
    flags.main(main)
