"""What the exchanging engines share: the plan of who goes where, moving rows by it, and a `Trip` there and back.

Slots (token, k) are sorted by (expert, token), stably, so the plan is a function of the routing alone. Rows are moved
by gathers in both passes: into the buffer by the slot that a row came from, out of it by K gathers in token order. No
scatter-add, so no duplicate indices and no order of summation that may change.

T tokens, K slots a token, N = T K slots, E experts, P peers, M rows of a send buffer, M_r of a receive buffer.
"""

import flax.struct
import jax
import jax.numpy as jnp

from molora_jax.core.types import Array

FILL = 0.0  # of rows that nobody writes; the tests set NaN: every reader masks with `where`


@flax.struct.dataclass
class Plan:
    """`slot [M]`: the slot (t K + k) that a buffer row came from; `filled [M]`; `place [T, K]`: its row; `kept [T, K]`.

    `expert [M]`: the row's expert, E_padded where not filled. `start, count [P]`: the rows of each peer among the slots
    in order; `dropped`: slots beyond the capacity, `asked`: slots with an expert.
    """

    slot: Array
    filled: Array
    place: Array
    kept: Array
    expert: Array
    start: Array
    count: Array
    dropped: Array
    asked: Array
    K: int = flax.struct.field(pytree_node=False)

    @property
    def token(self) -> Array:
        return self.slot // self.K

    @property
    def counts(self) -> Array:
        """`[1, 2]` float32, for the metrics."""
        return jnp.stack([self.asked, self.dropped]).astype(jnp.float32)[None]


def rows_to_a_peer(num_tokens: int, K: int, experts: int, peers: int, capacity: float) -> int:
    """C: the most rows that one device sends to one peer. A token has at most min(K, E/P) slots there."""
    dropless = num_tokens * min(K, experts // peers)
    if not capacity:
        return dropless
    return min(dropless, max(1, int(capacity * num_tokens * K / peers + 0.5)))


def make_plan(idx: Array, experts: int, peers: int, rows: int, *, padded: bool) -> Plan:
    """The plan of `idx [T, K]` (any value >= the number of experts: no expert).

    Args:
      experts: E, a multiple of `peers` (masked ones included); rows: C, the most rows to one peer.
      padded: C rows to every peer (M = P C); else all slots in order (M = N), those without an expert last.

    With more than C slots for a peer, the tokens that come first are kept.
    """
    K, flat, each = idx.shape[1], idx.reshape(-1), experts // peers
    N = len(flat)
    used = flat < experts
    owner = jnp.where(used, flat // each, peers)
    kept = used
    if rows < idx.shape[0] * min(K, each):
        mine = owner[:, None] == jnp.arange(peers)
        rank = jnp.sum(jnp.where(mine, jnp.cumsum(mine, axis=0) - 1, 0), axis=1)
        kept = used & (rank < rows)
    key = jnp.where(kept, flat, experts)
    order = jnp.argsort(key, stable=True).astype(jnp.int32)
    position = jnp.argsort(order).astype(jnp.int32)  # the inverse permutation
    before = jnp.sum(key[:, None] < jnp.arange(peers + 1) * each, axis=0, dtype=jnp.int32)
    start, count = before[:-1], before[1:] - before[:-1]
    if padded:
        c = jnp.arange(rows)
        filled = (c < count[:, None]).reshape(-1)
        slot = order[jnp.minimum(start[:, None] + c, N - 1).reshape(-1)]
        peer = jnp.minimum(owner, peers - 1)
        place = peer * rows + position - start[peer]
    else:
        filled, slot, place = jnp.arange(N) < before[-1], order, position
    return Plan(
        slot=slot, filled=filled, place=jnp.where(kept, place, 0).reshape(idx.shape), kept=kept.reshape(idx.shape),
        expert=jnp.where(filled, flat[slot], experts), start=start, count=count,
        dropped=jnp.sum(used & ~kept), asked=jnp.sum(used), K=K,
    )  # fmt: skip


def _collect(buffer, plan):
    """`[M, ...]` -> `[T, K, ...]`, 0 where a slot has no row."""
    kept = plan.kept.reshape(*plan.kept.shape, *(1,) * (buffer.ndim - 1))
    return jnp.where(kept, buffer[plan.place], 0)


@jax.custom_vjp
def send_tokens(x: Array, plan: Plan) -> Array:
    """`x [T, D]` -> `[M, D]`: a row for every slot; rows without one hold `FILL`."""
    return jnp.where(plan.filled[:, None], x[plan.token], jnp.asarray(FILL, x.dtype))


def _send_tokens_back(plan, d):
    return jnp.sum(_collect(d, plan).astype(jnp.float32), axis=1).astype(d.dtype), None


send_tokens.defvjp(lambda x, plan: (send_tokens(x, plan), plan), _send_tokens_back)


@jax.custom_vjp
def send_slots(v: Array, plan: Plan) -> Array:
    """`v [T, K, ...]` -> `[M, ...]`."""
    filled = plan.filled.reshape(-1, *(1,) * (v.ndim - 2))
    return jnp.where(filled, v.reshape(-1, *v.shape[2:])[plan.slot], jnp.asarray(FILL, v.dtype))


send_slots.defvjp(lambda v, plan: (send_slots(v, plan), plan), lambda plan, d: (_collect(d, plan), None))


@jax.custom_vjp
def combine(y: Array, plan: Plan) -> Array:
    """`y [M, D]`, the rows that came back -> `[T, D]`: the sum of a token's K rows, in float32."""
    return jnp.sum(_collect(y, plan).astype(jnp.float32), axis=1).astype(y.dtype)


def _combine_back(plan, d):
    return jnp.where(plan.filled[:, None], d[plan.token], jnp.asarray(FILL, d.dtype)), None


combine.defvjp(lambda y, plan: (combine(y, plan), plan), _combine_back)


class Trip:
    """Tokens on their way to the experts of other devices, and the way home.

    `way` has the `plan`, `there(buffer [M, ...]) -> [M_r, ...]` and `back`. `expert [M_r]` int32: what each row that
    came asks for, among the E/P experts here (E/P where the row is empty); `ids [M_r]` of `ids [T]`, where asked for;
    `counts [1, 2]`: slots sent and slots dropped, None where nothing can be.
    """

    def __init__(self, way, idx: Array, experts: int, on, ids: Array | None = None):
        self.way, self.idx, self.experts = way, idx, experts
        self.each, plan = on.padded(experts) // on.peers, way.plan
        names = [plan.expert] + ([] if ids is None else [ids[plan.token]])
        got = way.there(jnp.stack(names, axis=-1).astype(jnp.int32))
        mine = got[:, 0] - jax.lax.axis_index("expert") * self.each
        self.expert = jnp.where((mine >= 0) & (mine < self.each), mine, self.each)
        self.ids = None if ids is None else got[:, 1]
        self.counts = plan.counts if on.capacity else None

    def _written(self, rows):
        return jnp.where((self.expert < self.each).reshape(-1, *(1,) * (rows.ndim - 1)), rows, 0)

    def tokens(self, x: Array) -> Array:
        """`x [T, D]` -> `[M_r, D]`: a row for every slot that came, 0 where nobody wrote."""
        return self._written(self.way.there(send_tokens(x, self.way.plan)))

    def slots(self, v: Array) -> Array:
        """`v [T, K, ...]` -> `[M_r, ...]`."""
        return self._written(self.way.there(send_slots(v, self.way.plan)))

    def home(self, rows: Array) -> Array:
        """`[M_r, D]` -> `[T, D]`, the sum of each token's. Masked here too: so are the cotangents of empty rows."""
        return combine(self.way.back(self._written(rows)), self.way.plan)

    def lost(self, gates: Array) -> Array:
        """`gates [T, K]` -> `[T]`: the sum of those whose slots were dropped."""
        return jnp.sum(jnp.where((self.idx < self.experts) & ~self.way.plan.kept, gates, 0.0), axis=-1)
