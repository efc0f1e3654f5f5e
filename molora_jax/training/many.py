"""An axis of runs over a training step: N runs of one program side by side, the frozen base once.

    over_runs(step)(state, params, batch, fixed, knobs) -> (state, metrics)      state, batch, knobs, metrics [N, ...]

It is `jax.vmap` of the step of one run. So clip, norm, finiteness, skipped steps and statistics are a run's own; random
keys follow from each run's seed; adapters, optimizer and routers have the axis of runs in front. `params` have none: a
frozen product of all runs' rows is one product `[N, T, D] x [D, F]`, a layer of a sharded base is gathered once, and
no gradient has its size. The axis of runs is never sharded: every run's rows are spread over the mesh as they would be
alone, so nothing that runs do not share is exchanged between devices.

Clients of a federated round are such runs: `stack` their states, batches and `Knobs`, call the step, `take` one.
N runs, B rows, S sequence.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kernels_pallas.platform import side_by_side
from molora_jax.sharding import ROWS


def over_runs(step, axes=None):
    """The step of N runs, to be jitted as that of one (`training.step.make_step`).

    Args:
      axes: of `fixed`, the frozen models (see `shared_or_stacked`); None: all runs have the same.
    """

    def together(state, params, batch, fixed, knobs):
        with side_by_side():
            return jax.vmap(step, in_axes=(0, None, 0, axes, 0))(state, params, batch, fixed, knobs)

    return together


def stack(trees):
    """N trees of equal shapes as one, `[N, ...]`."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def take(tree, run):
    """One run's part; `run` may be traced."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, run, 0, keepdims=False), tree)


def shardings(of_one):
    """Of N runs' arrays, where one run's have these: the axis of runs in front, not sharded."""
    return jax.tree.map(lambda own: NamedSharding(own.mesh, P(None, *own.spec)), of_one)


def put_batches(batches: list[dict], mesh) -> dict[str, jax.Array]:
    """N batches of numpy rows `[B, S]` -> arrays `[N, B, S]`, each run's rows over the mesh. One process."""
    return put_stacked({name: np.stack([batch[name] for batch in batches]) for name in batches[0]}, mesh)


def put_stacked(batch: dict, mesh) -> dict[str, jax.Array]:
    """Rows `[N, B, S]` on the host -> as of `put_batches`."""
    sharding = NamedSharding(mesh, P(None, ROWS))
    return {name: jax.device_put(value, sharding) for name, value in batch.items()}


def shared_or_stacked(trees):
    """`(tree, axes)`: leaves that are one array in all trees stay it (axis None), the others are stacked (axis 0)."""
    same = lambda *leaves: all(leaf is leaves[0] for leaf in leaves)  # noqa: E731
    axes = jax.tree.map(lambda *leaves: None if same(*leaves) else 0, *trees)
    return jax.tree.map(lambda *leaves: leaves[0] if same(*leaves) else jnp.stack(leaves), *trees), axes


def as_one(metrics: dict) -> dict:
    """The metrics `[N, ...]` of runs that are one: means; `tokens` and `examples` are sums, `skipped` the largest."""
    total, most = {"tokens": np.sum, "examples": np.sum}, {"skipped": np.max}
    out = {}
    for name, value in metrics.items():
        reduce = (total | most).get(name, np.mean)
        out[name] = jax.tree.map(lambda x, r=reduce: r(np.asarray(x), axis=0), value)
    return out | {"clients/loss": np.asarray(metrics["loss"])}
