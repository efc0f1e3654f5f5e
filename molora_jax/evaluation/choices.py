"""Numbers of a run that chooses, on held-out items: classes of labelled texts, pairs of answers.

    accuracy         the fraction with the right class, or with the chosen answer before the rejected (a draw is 1/2)
    start            the untrained start: the base without adapters, with a fresh head
    majority         of classes: what the most frequent class of the training rows gets; of pairs: a half
    nll              -log p(right class), or -log sigmoid(difference), in nats an item

Each is `[value, low, high]` with a 95 % interval (`intervals.py`).
"""

import dataclasses

import jax
import numpy as np

from molora_jax import sharding
from molora_jax.evaluation import intervals
from molora_jax.objectives.held_out import example_nll
from molora_jax.text import table
from molora_jax.training.frozen import own_reference
from molora_jax.training.programs import START_KEY


def score(run, examples, *, start: bool, phases) -> dict:
    """`nll`, `right` (an entry an item) and `gates` of the run, or of its untrained start."""
    model = dataclasses.replace(run.model, max_segments=run.data.train.max_segments)
    objective, head = run.objective, run.config.objective.name
    fixed = {n: own_reference(source, run.base_params, run.start, model) for n, source in objective.frozen().items()}
    modules, adapters, state = run.modules, run.adapters, run.router_state
    if start:
        key = jax.random.fold_in(jax.random.key(run.config.seed), START_KEY)
        fresh = run.module_spec.init(key, run.base_params)
        modules = {name: leaves for name, leaves in fresh.items() if name != "base"}
        model, adapters, state = model.without_rules(), {}, {}
    bound = run.data.train.targets_per_row
    batches = run.data.heldout_batches(examples, run.config.eval.batch_size, targets_per_row=bound)
    phases.start(f"{'untrained start' if start else 'tuned'}: {len(examples)} items", len(batches))
    sums = example_nll(
        model, run.base_params, adapters, state, batches, len(examples), mesh=run.mesh, targets_per_row=bound,
        constrain=sharding.constrain(run.mesh), num_tasks=0 if start else len(run.data.task_names),
        done=phases.advance, objective=objective, modules=modules, head=head, fixed=fixed,
    )  # fmt: skip
    phases.end()
    return sums


def tasks(run, examples, start: dict, tuned: dict) -> dict:
    """A row a task."""
    ids, out = np.array([example.task_id for example in examples]), {}
    for task, name in enumerate(run.data.task_names):
        items = np.flatnonzero(ids == task)
        if not len(items):
            continue
        ones = np.ones(len(items))
        accuracy = lambda sums, at=items: intervals.wilson(float(sums["right"][at].sum()), len(at))  # noqa: E731
        out[name] = {
            "items": len(items),
            "nll": intervals.ratio(tuned["nll"][items], ones),
            "nll_start": intervals.ratio(start["nll"][items], ones),
            "nll_change": intervals.ratio_change(start["nll"][items], tuned["nll"][items], ones),
            "accuracy": accuracy(tuned),
            "accuracy_start": accuracy(start),
            "majority": majority(run, task, [examples[i] for i in items]),
        }
    return out


def majority(run, task: int, examples) -> list[float]:
    """What always answering the most frequent class of the task's training rows gets; of pairs, a half by chance."""
    if not run.labels:
        return [0.5, 0.5, 0.5]
    split = run.data.splits["train"]
    of = [split.example(int(i)).target_ids[0] for i in np.flatnonzero(split.task_ids == task)]
    of = of or [split.example(int(i)).target_ids[0] for i in range(len(split.length))]  # a task of data.valid alone
    favourite = int(np.bincount(of).argmax())
    return intervals.wilson(sum(example.target_ids[0] == favourite for example in examples), len(examples))


def text_table(report: dict) -> str:
    """One row a task and the mean over tasks; intervals are of the tuned model."""
    rows = [("task", "items", "NLL start", "NLL tuned", "majority", "accuracy start", "accuracy tuned", "95 %")]
    for name, t in report["tasks"].items():
        a = t["accuracy"]
        rows.append(
            (name, str(t["items"]), f"{t['nll_start'][0]:.3f}", f"{t['nll'][0]:.3f}", f"{t['majority'][0]:.1%}",
             f"{t['accuracy_start'][0]:.1%}", f"{a[0]:.1%}", f"{a[1]:.1%} - {a[2]:.1%}")
        )  # fmt: skip
    mean = lambda key: np.mean([t[key][0] for t in report["tasks"].values()])  # noqa: E731
    rows.append(
        ("mean", str(sum(t["items"] for t in report["tasks"].values())), f"{mean('nll_start'):.3f}",
         f"{mean('nll'):.3f}", *(f"{mean(key):.1%}" for key in ("majority", "accuracy_start", "accuracy")), "")
    )  # fmt: skip
    return table(rows, right=tuple(range(1, 8)))
