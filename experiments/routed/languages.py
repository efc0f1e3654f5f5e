"""SteloCoder: three toy languages, all of them ways to write digits; an expert each, then a gate that is told none.

comma   a-j are 0-9, with commas            semi   the same letters shifted by three, with semicolons
dash    digits as k-t, written backwards, with dashes            the answer: the digits
"""

import random

import numpy as np

from configs import common, stelocoder
from experiments.routed import small
from experiments.words import write_rows

SIZES, ITEMS = (3, 4), 1500
LANGUAGES = {
    "comma": lambda ds: ",".join("abcdefghij"[d] for d in ds),
    "semi": lambda ds: ";".join("abcdefghij"[(d + 3) % 10] for d in ds),
    "dash": lambda ds: "-".join("klmnopqrst"[d] for d in reversed(ds)),
}
FIRST = {  # what the base has learnt: to copy digits, in both orders and with other letters than the languages'
    "copy": lambda ds: " ".join(map(str, ds)),
    "back": lambda ds: "<" + " ".join(map(str, reversed(ds))),
    "capital": lambda ds: ".".join("ABCDEFGHIJ"[d] for d in ds),
}


def rows(write, seed, items):
    draw = random.Random(seed)
    seen = {tuple(draw.choices(range(10), k=draw.choice(SIZES))) for _ in range(items)}
    return [dict(prompt=write(ds), target="".join(map(str, ds))) for ds in sorted(seen)]


def files(workdir, languages):
    workdir.mkdir(parents=True, exist_ok=True)
    return tuple(write_rows(workdir / f"{name}.jsonl", rows(write, i, ITEMS))
                 for i, (name, write) in enumerate(languages.items()))  # fmt: skip


def fitted(made, source, steps):
    made.base.source = source
    made.data.update(seq_len=64)
    made.train.update(steps=steps, batch_size=16, save_every=0, log_every=100)
    made.eval.update(num_items=96, num_generated=0)
    return made


def gate_accuracy(run) -> float:
    """How often the prompt's one expert is that of its language."""
    from molora_jax.evaluation.measure import text_batch
    from molora_jax.evaluation.run import _gates

    right = []
    for example in run.data.heldout("test", 96):
        batch = text_batch(run, run.prompt_ids(example.prompt))
        gates = _gates(run.params, run.adapters, run.router_state, batch, model=run.model)["mix"]["model"]
        right.append(int(np.asarray(gates)[0, 0, 0].argmax()) == example.task_id)
    return round(float(np.mean(right)), 4)


def run(workdir, steps, found, keep):
    if all(f"stelocoder: {name}" in found for name in ("the gate", *_rivals())):
        return
    source = small.base(workdir, ",".join(files(workdir, FIRST)), 600)
    tasks, steps = files(workdir, LANGUAGES), 6 * steps
    if "stelocoder: the gate" not in found:
        made = fitted(stelocoder.get_config(snippets=tasks), source, steps)
        for stage, share, rate in (("s00", 0.5, 8e-3), ("s01", 0.35, 4e-3), ("s02", 0.15, 1e-2)):
            made.schedule[stage].update(steps=int(share * steps))
            made.schedule[stage].set.optim.learning_rate = rate
        made.schedule.s02.steps = 0
        done = small.trained(made, workdir / "gate")
        gated, oracle = small.scored(done)[1], small.scored(done, route="task")[1]
        keep("stelocoder: the gate", {
            "exact": gated, "exact of each language's own expert": oracle, "gate": gate_accuracy(done),
        })  # fmt: skip
    for number, (name, rank) in enumerate(_rivals().items()):
        if f"stelocoder: {name}" in found:
            continue
        made = fitted(small.config_of(source, ",".join(tasks), steps, rate=8e-3), source, int(0.85 * steps))
        adapter = common.adapter(rank=rank, alpha=8.0 * rank)
        made.method.rules = dict(mix=common.rule(f"{common.ATTENTION},down", adapter=adapter))
        keep(f"stelocoder: {name}", {"exact": small.scored(small.trained(made, workdir / f"one-{number}"))[1]})


def _rivals():
    return {"one LoRA, R = 4": 4, "one LoRA, R = 12": 12}
