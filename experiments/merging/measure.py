"""What a run says to the held-out items of all tasks: NLL, and whether every answer token is the likeliest."""

import numpy as np

import molora_jax as mj
from molora_jax import sharding
from molora_jax.evaluation.run import load_base_run
from molora_jax.objectives.held_out import example_nll


def scored(config, tasks, workdir) -> dict:
    """`{task: {nll, tokens, right}}`, a list each of sums over an answer's tokens, an entry an item."""
    run = load_base_run(config) if workdir is None else mj.load_run(workdir)
    run.config = config.copy_and_resolve_references()
    with run.config.unlocked():
        run.config.data.tasks = ",".join(tasks)
    data = run.data
    examples, bound = data.heldout("test", config.eval.num_items), data.train.targets_per_row
    sums = example_nll(
        run.model, run.params, run.adapters, run.router_state,
        data.heldout_batches(examples, config.eval.batch_size, targets_per_row=bound), len(examples), mesh=run.mesh,
        targets_per_row=bound, constrain=sharding.constrain(run.mesh),
    )  # fmt: skip
    ids = np.array([example.task_id for example in examples])
    return {
        name: {key: sums[key][ids == i].round(5).tolist() for key in ("nll", "tokens", "right")}
        for i, name in enumerate(data.task_names)
    }
