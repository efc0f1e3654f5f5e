"""Tokens travel to their experts: a padded `all_to_all` there and back. Experts stay at home and are never gathered.

    projection   ship x (D_in), get sum_e g_e B_e A_e x (D_out); the frozen product stays at home
    ffn          ship x (D), get w_k W_d h_k + low-rank down (D): the frozen weights are on every device

Every device sends C rows to each of the P devices. C = T min(K, E/P) is dropless; `capacity` bounds it, and what does
not fit is dropped and counted: a projection then has no change by that slot, an FFN the frozen h_0 in its place.
Numbers a layer and step inside a checkpointed stack, each P C (P-1)/P rows: x there twice (once recomputed), dx back;
y back (twice, but once where nothing in the layer comes after it: down, ffn), dy there: 3 D_in + (3 or 2) D_out. The
gate travels with its row, so that what comes back is summed as it is and no gradient needs it.
With `rank_space` all devices keep every A, and R numbers travel in place of D_in (projections only).

T tokens a device, K slots, E experts, R rank, P devices on `expert`, C rows to a peer, D width, F FFN width.
"""

import jax
import jax.numpy as jnp

from molora_jax.engines import common

MOVES = True  # whether tokens travel
STORES = True  # whether experts are kept in shards


class Padded:
    """C rows to every peer; `ragged_all_to_all` has another way."""

    def __init__(self, idx, experts: int, on):
        E = on.padded(experts)
        rows = common.rows_to_a_peer(*idx.shape, E, on.peers, on.capacity)
        self.plan = common.make_plan(jnp.where(idx < experts, idx, E), E, on.peers, rows, padded=True)

    def there(self, buffer):
        """`[P C, ...]` by peer, sent -> `[P C, ...]` by peer, received."""
        return jax.lax.all_to_all(buffer, "expert", 0, 0, tiled=True)

    back = there


def trip(idx, experts: int, on, ids=None) -> common.Trip:
    """Of slots `idx [T, K]` (E and more: no expert)."""
    return common.Trip(Padded(idx, experts, on), idx, experts, on, ids)


def bytes_moved(traffic, on) -> tuple[float, float]:
    """`(shipped, useful)` bytes of one device, layer and step; the useful rows are those of an even expert load."""
    rows = on.peers * common.rows_to_a_peer(traffic.T, traffic.K, on.padded(traffic.E), on.peers, on.capacity)
    there_and_back = traffic.K * traffic.T * (traffic.row_in + traffic.row_out)
    return rows_moved(traffic, on, rows), there_and_back * 2 * (on.peers - 1) / on.peers


def rows_moved(traffic, on, rows: int, line: int = 1) -> float:
    """Bytes of `rows` rows (each in whole lines) exchanged in every pass, and of the gradients of what stays."""
    there, back = traffic.passes + 1, 2 if traffic.last else traffic.passes + 1
    sizes = {"row": traffic.sent, "gate": 4, "ids": traffic.ids}
    row, gate, ids, out = (-(-size // line) * line for size in (*sizes.values(), traffic.row_out))
    row = there * (row + gate) + back * out + traffic.passes * ids
    moved = rows * row * (on.peers - 1) / on.peers
    if not on.stored(traffic.E):  # gradients of a leaf that is stored whole are gathered again
        padded = sum(size for size, each, _ in traffic.leaves if each) * on.padded(traffic.E) / traffic.E
        moved += padded * (on.peers - 1) / on.peers
    return moved + traffic.sharded(on) + traffic.sums(on, per_expert=False)
