"""Held-out negative log-likelihood, an example at a time; the routing of each task beside it.

The forward pass is the training one without dropout or noise; router state is read, never updated.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from molora_jax import sharding
from molora_jax.backbones.gates import by_layer
from molora_jax.core import trees
from molora_jax.objectives.base import Forward
from molora_jax.objectives.lm import PLAIN


@functools.partial(jax.jit, static_argnames=("model", "targets_per_row", "constrain", "num_tasks", "objective", "head"))
def _batch_nll(
    params, adapters, router_state, batch, modules, fixed, *, model, targets_per_row, constrain, num_tasks, objective,
    head,
):  # fmt: skip
    own, gates = trees.overlay(params, modules.get("base", {})), {}

    def hidden(batch):
        out, _, _, found = model.hidden(own, adapters, router_state, batch, constrain=constrain, collect=num_tasks > 0)
        gates.update(found)
        return out

    forward = Forward(model, own, hidden, targets_per_row, constrain)
    nll, weight, right, places = objective.score(forward, modules.get(head, {}), fixed, batch)
    index = jnp.take_along_axis(batch["example_index"], places, axis=1)
    if not num_tasks:
        return (nll, weight, right, index), {}
    tasks = jax.nn.one_hot(jnp.where(batch["segment_ids"] > 0, batch["task_ids"], -1), num_tasks)  # [B, S, tasks]
    by_task = lambda g: jnp.einsum("lbse,bst->tle", jnp.abs(g), tasks)  # noqa: E731  (a gate may be negative)
    return (nll, weight, right, index), jax.tree.map(by_task, by_layer(model, gates))


@functools.cache
def _replicate(mesh):
    """Kept: one made in each call would compile in each call."""
    return jax.jit(lambda x: x, out_shardings=sharding.replicated(mesh))


def example_nll(
    model, params, adapters, router_state, batches, num_examples, *, mesh, targets_per_row, constrain, num_tasks=0,
    done=lambda: None, forward=None, objective=PLAIN, modules=None, head="lm", fixed=None,
):  # fmt: skip
    """Sums over each example's answer tokens (end token included), or of its class or pair, as the objective says.

    Args:
      batches: from `DataSet.heldout_batches`, all of one shape.
      num_tasks: above 0, also sums the gates of each task's tokens (prompts included).
      done: called after each batch.
      objective: a member of `objectives`, whose head is `modules[head]`; modules: of a run; fixed: its frozen models.
      forward: `(params, adapters, router_state, batch)` -> as `_batch_nll`, in its place.

    Returns:
      dict of `nll` (nats, summed), `tokens`, `right` (argmax equals the target; a draw is 1/2), each `[num_examples]`
      float64; with `num_tasks` also `gates`: `{rule: {scope: [tasks, L, E_max]}}`, sums of the gates' sizes.
    """
    if forward is None:
        options = dict(targets_per_row=targets_per_row, constrain=constrain, num_tasks=num_tasks, objective=objective)
        of_batch = functools.partial(_batch_nll, model=model, head=head, **options)
        forward = lambda *given: of_batch(*given, modules or {}, fixed or {})  # noqa: E731
    sums = {name: np.zeros(num_examples) for name in ("nll", "tokens", "right")}
    total: dict = {}
    replicate = _replicate(mesh)
    for batch in batches:
        rows = sharding.rows_of_process(len(batch["tokens"]), mesh)
        local = {name: value[rows] for name, value in batch.items()}
        out, gates = replicate(
            forward(params, adapters, router_state, sharding.put_batch(local, mesh, len(batch["tokens"])))
        )
        nll, weight, right, index = (np.asarray(x).reshape(-1) for x in out)
        used = weight > 0
        for name, value in (("nll", nll), ("tokens", weight), ("right", right)):
            np.add.at(sums[name], index[used], value[used].astype(np.float64))
        gates = jax.tree.map(lambda g: np.asarray(g, np.float64), gates)
        total = jax.tree.map(np.add, total, gates) if total else gates
        done()
    return sums | {"gates": total} if num_tasks else sums
