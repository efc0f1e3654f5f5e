"""Squared gradients of single training examples, without dropout: the diagonal of the empirical Fisher information."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.platform import side_by_side
from molora_jax import sharding
from molora_jax.core import trees
from molora_jax.data.clients import Drawn
from molora_jax.data.example import seed_of, shuffled
from molora_jax.engines import ALONE
from molora_jax.objectives import Forward


def mean_squares(run, stage, state, rows: int) -> dict:
    """Of the trainable leaves, float32: the mean over `rows` examples (at most all) of the stage's own tasks of the
    squared gradient of the objective on that example alone, at the state's leaves.

    The rows are drawn by the run's seed and the tasks, without repeats.
    """
    stream = run.data.train.for_tasks(stage.tasks)
    ids = np.concatenate([stream.members(i) for i in stream.task_ids])
    ids = ids[shuffled(seed_of("squares", run.config.seed, stream.task_ids), len(ids))][:rows]
    size = run.config.train.batch_size
    take, total = of_examples(run, stage), None
    for first in range(0, len(ids), size):
        part = Drawn(stream, ids[first : first + size], rate=1.0, places=size, seed=0)
        batch = sharding.put(part.batch(0), sharding.replicated(run.mesh))
        squares = take(state, run.params, batch, run.fixed(run.programs[stage.name].objective))
        total = squares if total is None else jax.tree.map(jnp.add, total, squares)
    return jax.tree.map(lambda x: x / len(ids), total)


def of_examples(run, stage):
    """The jitted `(state, params, rows, fixed) -> sum over rows of the squared gradient`, made once a program."""
    compiled, program = run.compiled(stage), run.programs[stage.name]
    if compiled.squares is None:
        model, frozen = dataclasses.replace(program.model, engine=ALONE), compiled.frozen

        def of_row(trainable, still, params, state, row, fixed):
            rows = jax.tree.map(lambda x: x[None], row)

            def loss(trainable):
                adapters, modules = trees.apart(trees.merge(trainable, still))
                own = trees.overlay(params, modules.get("base", {}))
                hidden = lambda batch: model.hidden(own, adapters, state.router_state, batch)[0]  # noqa: E731
                forward = Forward(model, own, hidden, run.targets_per_row)
                heads = modules.get(program.head, {})
                return program.objective.loss(forward, heads, fixed, rows, program.objective.norm(rows))[0]

            there = jnp.any(row["loss_weight"] > 0)
            return jax.tree.map(lambda g: jnp.where(there, g**2, 0.0), jax.grad(loss)(trainable))

        def summed(state, params, rows, fixed):
            trainable, still = trees.split(state.leaves, frozen)
            with side_by_side():
                squares = jax.vmap(of_row, in_axes=(None, None, None, None, 0, None))(
                    trainable, still, params, state, rows, fixed
                )
            return jax.tree.map(lambda x: jnp.sum(x, axis=0), squares)

        compiled.squares = jax.jit(summed)
    return compiled.squares
