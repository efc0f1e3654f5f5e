"""One run of the leaderboard, in a process of its own: trains, scores the held-out items, says what it came to.

Reads a job `{"config", "workdir"}` as JSON on standard input; without rules in the config, the base alone is scored.
The last line on standard output is the result, or the `error` that the config's user can mend.
"""

import json
import pathlib
import statistics
import sys


def run(config, workdir: str) -> dict:
    """Trains (or goes on) in `workdir`, then scores the last step.

    Returns:
      `nll` {task: nats an answer token}, `peak_mb` of the training process, `seconds` of training with compilation,
      `first5`, `last5` (mean loss on answer tokens of the first and last five steps), `active_experts` (mean over
      sites, layers and the last five steps; None without a router).
    """
    from molora_jax.evaluation.run import load_run
    from molora_jax.training.loop import train

    made = train(config, workdir)
    if made.step < config.train.steps:
        raise SystemExit(f"stopped after step {made.step}")
    return scored(load_run(workdir, "latest", config=config), base=False) | {
        "peak_mb": round(made.peak_bytes / 2**20),
        "seconds": round(made.seconds, 1),
        **training(pathlib.Path(workdir) / "metrics.jsonl"),
    }


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


def scored(run, *, base: bool) -> dict:
    """`nll` by task on the test split, `items` and `answer_tokens` likewise."""
    import numpy as np

    from molora_jax.evaluation.progress import Phases
    from molora_jax.evaluation.score import score

    examples = run.data.heldout("test", run.config.eval.num_items)
    scores = score(run, examples, base=base, phases=Phases())
    task = np.array([e.task_id for e in examples])
    out: dict = {"nll": {}, "items": {}, "answer_tokens": {}}
    for i, name in enumerate(run.data.task_names):
        here = task == i
        if here.any():
            out["nll"][name] = round(float(scores.nll[here].sum() / scores.tokens[here].sum()), 5)
            out["items"][name], out["answer_tokens"][name] = int(here.sum()), int(scores.tokens[here].sum())
    return out


def main():
    job = json.loads(sys.stdin.read())
    answers, sys.stdout = sys.stdout, sys.stderr
    from molora_jax import config as config_lib
    from molora_jax import runtime
    from molora_jax.errors import InputError
    from molora_jax.evaluation.run import load_base_run

    runtime.configure()
    config = config_lib.from_dict(job["config"])
    try:
        if config.method.rules:
            result = run(config, job["workdir"])
        else:
            result = scored(load_base_run(config), base=True)
    except InputError as error:
        result = {"error": str(error)}
    print(json.dumps(result), file=answers, flush=True)


if __name__ == "__main__":
    main()
