"""An engine in one file: every device reads all tokens of its peers, and what its experts say is summed back.

An all-gather of tokens along `expert`, a reduce-scatter home.
"""

import jax
import jax.numpy as jnp

MOVES = True
STORES = True


class Trip:
    """Rows in order of (device, token, slot); those of other devices' experts are empty here."""

    counts = None

    def __init__(self, idx, experts, on, ids):
        self.K, each = idx.shape[1], on.padded(experts) // on.peers
        asked = self._everyone(jnp.where(idx < experts, idx, -1)).reshape(-1)
        mine = asked - jax.lax.axis_index("expert") * each
        self.here = (asked >= 0) & (mine >= 0) & (mine < each)
        self.expert = jnp.where(self.here, mine, each)
        self.ids = None if ids is None else jnp.repeat(self._everyone(ids), self.K)

    def _everyone(self, x):
        return jax.lax.all_gather(x, "expert", tiled=True)

    def _written(self, rows):
        return jnp.where(self.here.reshape(-1, *(1,) * (rows.ndim - 1)), rows, 0)

    def tokens(self, x):
        return self._written(jnp.repeat(self._everyone(x), self.K, axis=0))

    def slots(self, v):
        return self._written(self._everyone(v).reshape(-1, *v.shape[2:]))

    def home(self, rows):
        rows = self._written(rows).reshape(-1, self.K, rows.shape[-1]).sum(axis=1)
        return jax.lax.psum_scatter(rows, "expert", tiled=True)

    def lost(self, gates):
        return jnp.zeros(len(gates), gates.dtype)


def trip(idx, experts, on, ids=None):
    return Trip(idx, experts, on, ids)


def bytes_moved(traffic, on):
    rows = traffic.passes * (traffic.sent + traffic.row_out) * traffic.T * (on.peers - 1)
    return rows + traffic.sharded(on), rows
