"""Copies of live arrays for a checkpoint, and their digests where several processes hold the parts."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from molora_jax.io.digest import shard_sum, to_text


def shape_dtype(where, leaf):
    leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
        raise ValueError(f"{where}: store a random key as jax.random.key_data(key)")
    return tuple(leaf.shape), np.dtype(leaf.dtype)


def snapshot(where, leaf):
    """A copy that later donation cannot touch: in host memory, or on the devices where others hold parts of it."""
    shape_dtype(where, leaf)
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return jnp.copy(leaf)
    return np.array(leaf, order="C")  # np.asarray of a CPU array is a view of the buffer that gets donated


def gathered(host: dict) -> dict:
    """The snapshots of all items with every array whole in host memory. Called by all processes, on the main thread."""
    whole = lambda x: np.asarray(multihost_utils.process_allgather(x, tiled=True))  # noqa: E731
    return {
        item: {name: whole(x) if isinstance(x, jax.Array) else x for name, x in leaves.items()}
        for item, leaves in host.items()
    }


def digests_of_shards(host) -> dict[tuple[str, str], str]:
    """Digests on several processes: each adds up its own shards, then all add up. Called by all, on the main thread."""
    keys = [(item, name) for item, leaves in host.items() for name in leaves]
    sums = []
    for item, name in keys:
        x = host[item][name]
        if isinstance(x, jax.Array):
            mine = [s for s in x.addressable_shards if s.replica_id == 0]
            sums.append(sum(shard_sum(np.asarray(s.data), s.index, x.shape) for s in mine) % 2**64)
        else:
            sums.append(shard_sum(x) if jax.process_index() == 0 else 0)
    halves = np.array([(s >> 32, s & 0xFFFFFFFF) for s in sums], np.uint32).reshape(-1, 2)  # x64 may be off
    gathered = multihost_utils.process_allgather(halves)  # [processes, leaves, 2]
    return {
        key: to_text(sum((int(high) << 32) + int(low) for high, low in gathered[:, i])) for i, key in enumerate(keys)
    }
