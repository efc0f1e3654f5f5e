"""Numbers of a run on held-out items: NLL and generated answers of the tuned model and of its frozen base, routing.

Both models see the same items in the same batches. L layers, E experts.
"""

import dataclasses

import numpy as np

from molora_jax import sharding
from molora_jax.decode.generate import generate
from molora_jax.objectives.held_out import example_nll


@dataclasses.dataclass(frozen=True)
class Scores:
    """Of one model, an entry an item.

    `nll` (nats, summed over the answer) and `tokens [items]`; `answers`: generated text, None beyond the first
    `num_generated` of a task; `gates`: `{rule: {scope: [tasks, L, E]}}` of the tuned model.
    """

    nll: np.ndarray
    tokens: np.ndarray
    answers: list
    gates: dict


def chosen(examples, per_task: int) -> list[int]:
    """Indices of the first `per_task` items of every task."""
    seen: dict[int, int] = {}
    out = []
    for i, example in enumerate(examples):
        seen[example.task_id] = seen.get(example.task_id, 0) + 1
        if seen[example.task_id] <= per_task:
            out.append(i)
    return out


def score(run, examples, *, base: bool, phases) -> Scores:
    """Scores `examples` (from `DataSet.heldout`) with the run, or with its base alone."""
    options, name = run.config.eval, "base" if base else "tuned"
    model = run.model.without_rules() if base else run.model
    adapters, state = ({}, {}) if base else (run.adapters, run.router_state)
    params = run.base_params if base and run.base_params is not None else run.params
    bound = run.data.train.targets_per_row
    batches = run.data.heldout_batches(examples, options.batch_size, targets_per_row=bound)
    phases.start(f"{name}: NLL of {len(examples)} answers", len(batches))
    sums = example_nll(
        model, params, adapters, state, batches, len(examples), mesh=run.mesh, targets_per_row=bound,
        constrain=sharding.constrain(run.mesh), num_tasks=0 if base else len(run.data.task_names), done=phases.advance,
    )  # fmt: skip
    phases.end()
    answers, picked = [None] * len(examples), chosen(examples, options.num_generated)
    if picked:
        phases.start(f"{name}: {len(picked)} generated answers", len(picked))
        ids = generate(
            model, params, adapters, state, [list(examples[i].context_ids) for i in picked],
            max_new_tokens=options.max_new_tokens, eos_id=run.tokenizer.end_ids, batch_size=options.batch_size,
            done=phases.advance,
        )  # fmt: skip
        for i, answer in zip(picked, ids, strict=True):
            answers[i] = run.text(answer)
        phases.end()
    return Scores(sums["nll"], sums["tokens"], answers, sums.get("gates", {}))
