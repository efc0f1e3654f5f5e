"""FlyLoRA: two tasks apart, then the mean of both runs' leaves; frozen and trained A, both selections, both rates."""

import numpy as np

from configs import common
from experiments.routed import small

TASKS = ("morph", "math")


def flown(select, rate):
    return (dict(name="lora_sparse_a", rank=1, alpha=2.0, density=0.25), "32",
            dict(name="sparse_projection", k=8, density=0.25, select=select, bias_rate=rate))  # fmt: skip


ROWS = {
    "LoRA, R = 8": (dict(rank=8, alpha=16.0), "1", None),
    "frozen A, R = 32": (dict(name="lora_fa", rank=32, alpha=64.0), "1", None),
    "abs, u = 1e-3": flown("abs", 1e-3),
    "abs, u = 0": flown("abs", 0.0),
    "signed, u = 1e-3": flown("signed", 1e-3),
    "signed, u = 0": flown("signed", 0.0),
}


def gini(run, texts) -> float:
    """Of how often each rank is chosen: 0 is alike, mean over sites and layers."""
    counts = None
    for text in texts:
        gates = run.routing(text)["all"]
        own = np.concatenate([(g > 0).sum(axis=1) for g in gates.values()])
        counts = own if counts is None else counts + own
    ranked = np.sort(counts, axis=1)
    n = ranked.shape[1]
    spread = (ranked * (2 * np.arange(1, n + 1) - n - 1)).sum(axis=1) / (n * np.maximum(ranked.sum(axis=1), 1))
    return round(float(spread.mean()), 4)


def run(workdir, steps, found, keep):
    from molora_jax.evaluation.run import load_run
    from molora_jax.surgery.perform import perform

    source = None
    for number, (name, (adapter, experts, router)) in enumerate(ROWS.items()):
        name = f"flylora: {name}"
        if name in found:
            continue
        source, own, texts = source or small.base(workdir), {}, []
        for task in TASKS:
            made = small.config_of(source, task, steps)
            made.method.rules = small.rules(
                experts=experts, router=router, adapter=common.adapter(**{"name": "lora", "dropout": 0.0} | adapter)
            )
            done = small.trained(made, workdir / f"{number}-{task}")
            own[task] = small.scored(done)[0][task]
            texts += [e.prompt for e in done.data.heldout("test", 8)]
        merged = common.surgery("average")
        merged.surgery.inputs = tuple(str(workdir / f"{number}-{task}") for task in TASKS)
        out = workdir / f"{number}-mean"
        if not (out / "config.json").is_file():
            perform(merged, str(out))
        both, _ = small.scored(load_run(str(out), "latest"), ",".join(TASKS))
        keep(name, {
            "NLL": own, "NLL of the mean": both, "Gini": gini(done, texts[-8:]) if router else None,
        })  # fmt: skip
