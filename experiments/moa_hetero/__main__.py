"""Kinds of adapters side by side: LoRA, the plain sum of three kinds, and MoA's weights, soft and sparse (2506.05928).

python -m experiments.moa_hetero [--steps=250] [--seeds=2] [--workdir=runs/moa_hetero]

A decoder of four layers (width 64, bytes) is trained whole on prose, then adapted to two synthetic tasks (reversed
letters, the next letters) with as many trained numbers in each form. Finished runs are kept. Writes results.json and
results.png beside this file.
"""

import json
import pathlib
import random

from configs import common
from experiments import small_base
from experiments.words import kept, write_rows
from launch import flags
from molora_jax import config as schema
from molora_jax.io.files import write_atomically
from molora_jax.pictures import figure, save, shades

HERE = pathlib.Path(__file__).parent
FLAGS = [
    ("--steps", dict(type=int, default=250, help="optimizer steps of each form")),
    ("--seeds", dict(type=int, default=2)),
    ("--workdir", dict(default="runs/moa_hetero", metavar="DIR")),
]
PROSE, FIRST = "factbook,topic", 400  # FIRST: steps on prose
SITES, LORA_RANK, EVERY = f"{common.ATTENTION},down", 12, 25
KINDS = ("lora", "prompt", "parallel")
ROUTER = dict(name="sigmoid_threshold", f="swiglu", expand=1)
SPARSE = ROUTER | dict(mode="sparse")
FORMS = {  # name -> (adapters, router)
    "LoRA": (("lora",), None),
    "sum of the kinds": (KINDS, None),
    "soft": (KINDS, ROUTER),
    "sparse, masked": (("lora", "parallel"), SPARSE | dict(sparse_weight="masked")),
    "sparse, shifted": (("lora", "parallel"), SPARSE | dict(sparse_weight="shifted")),
}
PLACES = ("q", "k", "v", "prompt", "o", "down", "parallel")


def rule(form: str, rank: int, width: int):
    adapters, router = FORMS[form]
    return common.rule(
        SITES, adapter=common.adapter(rank=rank, alpha=float(rank), dropout=0.0), adapters=adapters, router=router,
        placement=dict(name="block", width=width),
    )  # fmt: skip


def config_of(*setting, rules):
    made = small_base.config_of(*setting)
    made.method.rules = rules
    return made


def write_tasks(workdir) -> str:
    """Two tasks of random words, 3,000 rows each."""
    draw, entries = random.Random(0), []
    letters = "abcdefghijklmnopqrstuvwxyz"
    word = lambda: "".join(draw.choice(letters) for _ in range(draw.randint(3, 7)))  # noqa: E731
    following = lambda w: "".join(letters[(letters.index(c) + 1) % 26] for c in w)  # noqa: E731
    for name, answer in (("reverse", lambda w: w[::-1]), ("next", following)):
        words = sorted({word() for _ in range(3000)})
        rows = [dict(prompt=f"{name} {w}", target=answer(w)) for w in words]
        entries.append(write_rows(workdir / f"{name}.jsonl", rows))
    return ",".join(entries)


def sizes(source) -> dict:
    """`{form: (rank, width, trained)}`, each within 5 % of LoRA of rank LORA_RANK."""
    from molora_jax.backbones.compile import compile_model
    from molora_jax.backbones.sizes import num_trainable
    from molora_jax.io.base import load_base

    decoder = load_base(source).config
    count = lambda form, r, w: num_trainable(  # noqa: E731
        compile_model(config_of(source, PROSE, 1, 0, 1e-3, rules=dict(all=rule(form, r, w))), decoder)
    )
    wanted, found = count("LoRA", LORA_RANK, 16), {}
    for form in FORMS:
        ranks = range(LORA_RANK, 3, -1)
        ways = [(abs(count(form, r, w) - wanted), -w, r) for r in ranks for w in (16, 14, 12, 10, 8)]
        _, width, rank = min(way for way in ways if form != "LoRA" or way[2] == LORA_RANK)
        found[form] = rank, -width, count(form, rank, -width)
        assert abs(found[form][2] / wanted - 1) < 0.05, found
    return found


def weights(workdir, form: str) -> dict:
    """On held-out prompts: the mean weight of each place by layer, the share of active places, tau before and after."""
    import jax
    import numpy as np

    from molora_jax.evaluation.run import load_run
    from molora_jax.training.programs import START_KEY

    if FORMS[form][1] is None:
        return {}
    run = load_run(workdir)
    items = run.data.heldout("test", 24)
    gates = [run.routing(item.prompt)["all"]["block"] for item in items]
    gates = np.concatenate(gates, axis=1)  # [L, tokens, K]
    out = {"weight": gates.mean(axis=1).round(3).tolist(), "active": float((gates > 0).mean())}
    if FORMS[form][1].get("mode") == "sparse":
        x = np.asarray(run.params["embed"])[np.concatenate([run.tokenizer.encode(item.prompt) for item in items])]
        key = jax.random.fold_in(jax.random.key(run.config.seed), START_KEY)
        tau = lambda p: float((0.5 / (1 + np.exp(-(x @ p["w_tau"][0].T + p["b_tau"][0])))).mean())  # noqa: E731
        trees = run.model.init_adapters(key, run.base_params), run.adapters
        (segment,) = run.model.segments
        leaves = [jax.device_get(tree["all"][segment.name]["router"]["block"]) for tree in trees]
        out["tau of layer 0"] = [tau(p) for p in leaves]
        out["threshold moved"] = float(max(np.abs(leaves[0][n] - leaves[1][n]).max() for n in ("w_tau", "b_tau")))
    return out


def measured(workdir, made) -> dict:
    from molora_jax.training.loop import train

    with made.unlocked():
        made.train.eval_every = EVERY
    schema.validate(made)
    result = train(made, str(workdir))
    if result.step < made.train.steps:
        raise SystemExit(f"stopped at step {result.step}: the same command goes on")
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {"valid_nll": {str(row["step"]): row["valid_nll"] for row in rows if "valid_nll" in row}}


def main(argv):
    _, args = flags.parse(__doc__, FLAGS, argv, need_config=False)
    from molora_jax import runtime

    runtime.configure()
    workdir, path = pathlib.Path(args.workdir), HERE / "results.json"
    workdir.mkdir(parents=True, exist_ok=True)
    source = small_base.first_base(workdir, small_base.config_of("random:tiny", PROSE, FIRST, 0, 2e-3))
    found, tasks = kept(path, steps=args.steps), write_tasks(workdir)
    forms = sizes(source)
    for seed in range(args.seeds):
        for number, (form, (rank, width, count)) in enumerate(forms.items()):
            key, folder = f"{form} | seed {seed}", workdir / f"{number}-{seed}"
            if key in found["runs"]:
                continue
            made = config_of(source, tasks, args.steps, seed, 4e-3, rules=dict(all=rule(form, rank, width)))
            own = dict(rank=rank, width=width, trained=count)
            found["runs"][key] = own | measured(folder, made) | weights(folder, form)
            write_atomically(path, json.dumps(found, indent=1) + "\n")
    report(found)
    return 0


def report(found):
    """A line a run; held-out NLL over steps, and the mean weights of the soft form by place and layer."""
    fig, (left, right) = figure(1, 2, figsize=(9, 3.6), layout="constrained")
    for colour, form in zip(shades(len(FORMS)), FORMS, strict=True):
        runs = [run for key, run in found["runs"].items() if key.startswith(f"{form} |")]
        for number, run in enumerate(runs):
            steps, values = [int(step) for step in run["valid_nll"]], list(run["valid_nll"].values())
            left.plot(steps, values, color=colour, label=form if number == 0 else None)
            more = {k: v for k, v in run.items() if k in ("active", "tau of layer 0", "threshold moved")}
            print(f"{form:18} R {run['rank']:2} {run['trained']:6,} trained, NLL {values[-1]:.3f} {more or ''}")
    left.set(xlabel="step", ylabel="held-out NLL (nats a token)")
    left.legend(frameon=False, fontsize=8)
    soft = found["runs"]["soft | seed 0"]["weight"]
    for layer, (colour, row) in enumerate(zip(shades(len(soft)), soft, strict=True)):
        right.plot(PLACES, row, "o-", color=colour, label=f"layer {layer}")
    right.set(ylabel="mean weight (soft, seed 0)")
    right.legend(frameon=False, fontsize=8)
    print(save(fig, HERE / "results.png"))


if __name__ == "__main__":
    flags.main(main)
