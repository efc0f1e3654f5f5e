"""Folders of runs made by hand: what a page and a sweep read of them, without a step of training."""

import json

import numpy as np

from molora_jax import config as config_lib
from molora_jax.runs import manifest
from tests.tiny import tiny_config


def config(**train):
    made = tiny_config("mixlora")
    with made.unlocked():
        made.data.update(tasks="morph")
        made.train.update(dict(steps=40, eval_every=10) | train)
    return made


def write_run(folder, made, *, step=None, nll=1.0, rows=None, patience=None, skipped=0):
    """A run at `step` (its end if None) whose held-out NLL falls to `nll`."""
    step = made.train.steps if step is None else step
    plain = config_lib.to_dict(made)
    (folder / "checkpoints" / str(step)).mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(plain))
    meta = dict(samples=step, config=plain, parameters=dict(base=1000, trained=100, frozen=0))
    meta |= {"patience": patience} if patience else {}
    manifest.write(folder / "checkpoints" / str(step), manifest.build(step, meta=meta, tree={}, files={}))
    if rows is None:
        rng = np.random.default_rng(0)
        rows = [
            dict(step=s, lm_loss=nll + 1 / s + 0.1 * rng.random(), tokens=100, seconds=0.5, skipped=skipped)
            | {"site/ffn/ffn/load_max_over_mean": [1.5, 2.5], "time/tokens_per_second_device": 200.0}
            | ({"valid_nll": nll + (step - s) / 100} if s % 10 == 0 or s == step else {})
            for s in range(1, step + 1)
        ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_report(folder, tasks=("double", "even"), *, shift=0.0, items=32, answers=None):
    """A `report.json` whose items of one task are `shift` nats harder than those of another call."""
    found, rows = {}, {}
    for number, task in enumerate(tasks):
        rng = np.random.default_rng(number)
        tokens = rng.integers(2, 6, items)
        nll = rng.gamma(2.0, 1.0, items) + shift * tokens
        right = (rng.random(items) < 0.5).astype(float)
        value = float(nll.sum() / tokens.sum())
        found[task] = dict(
            items=items, generated=items, nll=[value, value - 0.1, value + 0.1], nll_base=[3.0, 2.9, 3.1],
            exact=[float(right.mean()), 0.3, 0.7], exact_base=[0.1, 0.0, 0.2],
        )  # fmt: skip
        rows[task] = dict(row=[f"{task}{i}" for i in range(items)], nll=nll.tolist(), tokens=tokens.tolist(),
                          right=right.tolist())  # fmt: skip
    share = np.full((4, 8), 1 / 8).tolist()
    routing = {"ffn": {"ffn": {task: share for task in tasks}}}
    report = dict(step=40, tasks=found, routing=routing, held_out="5.0% by a hash", rows=rows, answers=answers or {})
    (folder / "report").mkdir(exist_ok=True)
    (folder / "report" / "report.json").write_text(json.dumps(report))
    return report
