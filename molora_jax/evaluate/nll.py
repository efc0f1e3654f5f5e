"""Held-out negative log-likelihood, an example at a time.

The forward pass is the training one without dropout or noise; router state is read, never updated.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from molora_jax import sharding
from molora_jax.train.objective import token_nll


@functools.partial(jax.jit, static_argnames=("model", "targets_per_row", "constrain"))
def _batch_nll(params, adapters, router_state, batch, *, model, targets_per_row, constrain):
    hidden, _, _, _ = model.hidden(params, adapters, router_state, batch, constrain=constrain)
    nll, weight, right, where = token_nll(model, params, hidden, batch, targets_per_row)
    index = jnp.take_along_axis(batch["example_index"], where, axis=1)
    return nll, weight, right, index


def example_nll(model, params, adapters, router_state, batches, num_examples, *, mesh, targets_per_row, constrain):
    """Sums over each example's answer tokens (end token included).

    Args:
      batches: from `DataSet.heldout_batches`, all of one shape.

    Returns:
      dict of `nll` (nats, summed), `tokens`, `right` (argmax equals the target), each `[num_examples]` float64.
    """
    sums = {name: np.zeros(num_examples) for name in ("nll", "tokens", "right")}
    replicate = jax.jit(lambda x: x, out_shardings=sharding.replicated(mesh))
    for batch in batches:
        rows = sharding.rows_of_process(len(batch["tokens"]))
        local = {name: value[rows] for name, value in batch.items()}
        out = _batch_nll(
            params, adapters, router_state, sharding.put_batch(local, mesh, len(batch["tokens"])),
            model=model, targets_per_row=targets_per_row, constrain=constrain,
        )  # fmt: skip
        nll, weight, right, index = (np.asarray(x).reshape(-1) for x in replicate(out))
        used = weight > 0
        for name, value in (("nll", nll), ("tokens", weight), ("right", right)):
            np.add.at(sums[name], index[used], value[used].astype(np.float64))
    return sums
