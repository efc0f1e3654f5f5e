"""Tokens travel to their experts, exactly as many rows as there are: `jax.lax.ragged_all_to_all`, or its emulation.

As `all_to_all`, with T K rows sent instead of P C. The receive buffer has to hold the worst case, P C rows, C as there.
On TPU each row, gate and id is sent in whole lines of 512 bytes.
The primitive runs on TPU; XLA:CPU does not have it, so elsewhere an exact emulation stands in its place: one program,
the primitive swapped by the mesh's platform. (Not on v5e slices of 16x16, says the compiler.)

T tokens a device, K slots, E experts, P devices on `expert`, C rows to a peer, N = T K.
"""

import jax
import jax.numpy as jnp

from molora_jax.engines import all_to_all, common

MOVES = True  # whether tokens travel
STORES = True  # whether experts are kept in shards

LINE = 512  # bytes: 128 numbers of float32, 256 of bfloat16


class Ragged:
    """Rows in order of (expert, token); a receiver holds its senders' rows one after another."""

    def __init__(self, idx, experts: int, on):
        self.on, E = on, on.padded(experts)
        rows = common.rows_to_a_peer(*idx.shape, E, on.peers, on.capacity)
        self.plan = common.make_plan(jnp.where(idx < experts, idx, E), E, on.peers, rows, padded=False)
        self.worst = on.peers * rows
        sizes = jax.lax.all_gather(self.plan.count, "expert")  # [from, to]
        starts = jax.lax.all_gather(self.plan.start, "expert")
        places = jnp.cumsum(sizes, axis=0) - sizes  # where a sender's rows start at a receiver
        self.out = (starts, sizes, places)  # from home to the experts
        self.home = (places.T, sizes.T, starts.T)  # and back

    def there(self, buffer):
        """`[N, ...]` in order of the plan -> `[worst, ...]`, `FILL` beyond the last row."""
        return exchange(buffer, self.worst, self.out, self.on)

    def back(self, buffer):
        """`[worst, ...]` -> `[N, ...]`."""
        return exchange(buffer, len(self.plan.slot), self.home, self.on)


def exchange(rows, out_rows: int, table, on):
    """Sends `rows[start : start + size]` of `table[..][me, to]` to each peer, where they start at `place`."""
    starts, sizes, places = table
    me = jax.lax.axis_index("expert")
    output = jnp.full((out_rows, *rows.shape[1:]), common.FILL if rows.dtype != jnp.int32 else -1, rows.dtype)
    if on.mesh.devices.flat[0].platform == "tpu":
        return jax.lax.ragged_all_to_all(
            rows, output, starts[me], sizes[me], places[me], sizes[:, me], axis_name="expert"
        )
    return emulate(rows, output, starts[:, me], sizes[:, me], places[:, me])


@jax.custom_vjp
def emulate(rows, output, starts, sizes, places):
    """What the primitive does, by gathering everybody's rows: `starts, sizes, places [P]` of what is sent to me."""
    everyone = jax.lax.all_gather(rows, "expert")  # [P, N, ...]
    row = jnp.arange(len(output))
    mine = (row >= places[:, None]) & (row < (places + sizes)[:, None])  # [P, out]: at most one sender a row
    sender = jnp.argmax(mine, axis=0)
    source = jnp.clip(starts[sender] + row - places[sender], 0, rows.shape[0] - 1)
    got = mine.any(axis=0).reshape(-1, *(1,) * (output.ndim - 1))
    return jnp.where(got, everyone[sender, source], output)


def _emulate_back(saved, d):
    """The same exchange the other way."""
    num_rows, *tables = saved
    me = jax.lax.axis_index("expert")
    starts, sizes, places = (jax.lax.all_gather(t, "expert")[:, me] for t in tables)  # by receiver, of my rows
    zeros = jnp.zeros((num_rows, *d.shape[1:]), d.dtype)
    return emulate(d, zeros, places, sizes, starts), None, None, None, None


def _emulate_forward(rows, output, starts, sizes, places):
    return emulate(rows, output, starts, sizes, places), (rows.shape[0], starts, sizes, places)


emulate.defvjp(_emulate_forward, _emulate_back)


def trip(idx, experts: int, on, ids=None) -> common.Trip:
    """As `all_to_all.trip`."""
    return common.Trip(Ragged(idx, experts, on), idx, experts, on, ids)


def bytes_moved(traffic, on) -> tuple[float, float]:
    """`(shipped, useful)` bytes of one device, layer and step, at an even expert load, on TPU.

    (The emulation gathers all.)
    """
    useful = all_to_all.bytes_moved(traffic, on)[1]
    return all_to_all.rows_moved(traffic, on, traffic.T * traffic.K, LINE), useful
