"""Runs of the leaderboard in a process of its own: trains, scores the held-out items, says what it came to.

Reads a job `{"configs": {name: config}, "workdir"}` as JSON on standard input. Several configs train in one step
(`training.group`), one by itself; a config that trains nothing is the base alone. The last line on standard output is
`{name: result}`, or the `error` that the config's user can mend.
"""

import hashlib
import json
import pathlib
import statistics
import sys

BLOCKS = 20  # of held-out items: how much another draw of them would change


def trains(config) -> bool:
    return bool(config.method.rules or config.method.train_base)


def run(config, workdir: str) -> dict:
    """Trains (or goes on) in `workdir`, then scores the last step.

    Returns:
      `nll` {task: nats an answer token} of the tasks that train, `beside` likewise of those that are only scored,
      `blocks` (see `scored`), `consistency` and `experts_by_task` (see there), `digest` of what was trained, `peak_mb`
      of the training process, `seconds` of training with compilation, `first5`, `last5` (mean loss on answer tokens of
      the first and last five steps), `active_experts` (mean over sites, layers and the last five steps; None without a
      router).
    """
    from molora_jax.training.loop import train

    made = train(config, workdir)
    return result(config, workdir, made)


def together(configs: dict, workdir: str) -> dict:
    """`{name: result}` of runs in one step; a run without a finite gradient has no `nll`."""
    from molora_jax.errors import InputError
    from molora_jax.training.group import train_together

    try:
        made = train_together(configs, workdir)
    except InputError as error:  # a rate too high for one run harms no other: each has its last step
        if "finite" not in error.got:
            raise
        made = None
    out = {}
    for name, config in configs.items():
        try:
            out[name] = result(config, str(pathlib.Path(workdir) / name), made and made[name], routing=False)
        except FloatingPointError:
            out[name] = {"nll": {}}
    return out


def result(config, workdir: str, made, *, routing: bool = True) -> dict:
    import math

    from molora_jax.evaluation.run import load_run

    if made is not None and made.step < config.train.steps:
        raise SystemExit(f"stopped after step {made.step}")
    loaded = load_run(workdir, "latest", config=config)
    out = scored(loaded, base=False) | {"digest": trained_digest(loaded)}
    if routing:  # what chooses a rate needs no more than the loss
        out |= {"consistency": consistency(loaded), "experts_by_task": experts_by_task(loaded)}
    if not all(map(math.isfinite, out["nll"].values())):
        raise FloatingPointError(workdir)
    if made is not None:
        out |= {"peak_mb": round(made.peak_bytes / 2**20), "seconds": round(made.seconds, 1)}
    return out | training(pathlib.Path(workdir) / "metrics.jsonl")


def trained_digest(loaded) -> str:
    """Of every trained value, bit by bit: two runs with the same one are the same."""
    import jax
    import numpy as np

    total = hashlib.sha256()
    trees = (loaded.adapters, loaded.modules, loaded.router_state)
    for path, leaf in jax.tree_util.tree_leaves_with_path(trees):
        total.update(jax.tree_util.keystr(path).encode() + np.ascontiguousarray(leaf).tobytes())
    return total.hexdigest()[:16]


def training(path) -> dict:
    """What the metrics of a run say: its loss at both ends, and how many experts a token used."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    loss = [float(row["lm_loss"]) for row in rows]
    used = [v for row in rows[-5:] for name, values in row.items() if name.endswith("/active_experts") for v in values]
    return {
        "first5": round(statistics.mean(loss[:5]), 4),
        "last5": round(statistics.mean(loss[-5:]), 4),
        "active_experts": round(statistics.mean(map(float, used)), 3) if used else None,
    }


def consistency(run) -> dict | None:
    """SRP of 16 tokens (`molora_jax.evaluation.consistency`) on the rows that nothing trains on, the mean over rules,
    scopes and layers: `value`, and `permuted`, the same loads without memory. None without such rows or a router."""
    examples = run.data.heldout("test", run.config.eval.num_items)
    rows = [list(e.ids) for e in examples if e.task_id >= run.data.num_trained and len(e.ids) >= 16]
    routed = run.consistency(rows) if rows else {}
    found = [srp for scopes in routed.values() for layers in scopes.values() for srp in layers if srp is not None]
    if not found:
        return None
    return {name: round(statistics.mean(getattr(srp, name) for srp in found), 5) for name in ("value", "permuted")}


def experts_by_task(run, items: int = 50) -> dict[str, float] | None:
    """Experts that a token uses, the mean over rules, scopes, layers and tokens of the first items of each task; None
    without a router."""
    used: dict[str, list[float]] = {}
    for e in run.data.heldout("test", min(items, run.config.eval.num_items)):
        gates = [
            layer for scopes in run.routing(list(e.ids)).values() for layers in scopes.values() for layer in layers
        ]
        counts = [float((layer > 0).sum(-1).mean()) for layer in gates if layer.any()]
        if not counts:
            return None
        used.setdefault(e.task, []).append(statistics.mean(counts))
    return {task: round(statistics.mean(values), 4) for task, values in used.items()}


def scored(run, *, base: bool) -> dict:
    """`nll`, `items` and `answer_tokens` by task on the test split; `beside`: the NLL of tasks that nothing trains on.

    `blocks`: the mean over tasks of the NLL in each of BLOCKS parts of every task's items, [] where a task has fewer.
    """
    import numpy as np

    from molora_jax.evaluation.progress import Phases
    from molora_jax.evaluation.score import score

    examples = run.data.heldout("test", run.config.eval.num_items)
    scores = score(run, examples, base=base, phases=Phases())
    task = np.array([e.task_id for e in examples])
    out: dict = {"nll": {}, "items": {}, "answer_tokens": {}, "beside": {}}
    blocks = []
    for i, name in enumerate(run.data.task_names):
        here = np.flatnonzero(task == i)
        if not len(here):
            continue
        nll, tokens, trained = scores.nll[here], scores.tokens[here], i < run.data.num_trained
        out["nll" if trained else "beside"][name] = round(float(nll.sum() / tokens.sum()), 5)
        if trained:
            out["items"][name], out["answer_tokens"][name] = len(here), int(tokens.sum())
            parts = [slice(k, None, BLOCKS) for k in range(BLOCKS)]
            blocks.append([float(nll[p].sum() / tokens[p].sum()) for p in parts] if len(here) >= BLOCKS else None)
    if blocks and all(blocks):
        out["blocks"] = [round(float(x), 5) for x in np.mean(blocks, axis=0)]
    return out


def main():
    job = json.loads(sys.stdin.read())
    answers, sys.stdout = sys.stdout, sys.stderr
    from molora_jax import config as config_lib
    from molora_jax import runtime
    from molora_jax.errors import InputError
    from molora_jax.evaluation.run import load_base_run

    runtime.configure()
    configs = {name: config_lib.from_dict(config) for name, config in job["configs"].items()}
    first = next(iter(configs.values()))
    try:
        if len(configs) > 1:
            results = together(configs, job["workdir"])
        else:
            alone = run(first, job["workdir"]) if trains(first) else scored(load_base_run(first), base=True)
            results = {name: alone for name in configs}
    except InputError as error:
        results = {"error": str(error)}
    except FloatingPointError:
        results = {"error": "no finite loss on the held-out items"}
    print(json.dumps(results), file=answers, flush=True)


if __name__ == "__main__":
    main()
