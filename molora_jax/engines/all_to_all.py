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

from molora_jax.core import lowrank
from molora_jax.engines import common
from molora_jax.engines.base import Engine
from molora_jax.placements import ffn, projection

MOVES = True  # whether tokens travel


class Padded:
    """How rows travel; `ragged_all_to_all` has another one."""

    def __init__(self, idx, experts: int, on: Engine):
        self.on, self.experts = on, on.padded(experts)
        self.rows = common.rows_to_a_peer(*idx.shape, self.experts, on.peers, on.capacity)
        self.plan = common.make_plan(
            jnp.where(idx < experts, idx, self.experts), self.experts, on.peers, self.rows, padded=True
        )

    def there(self, buffer):
        """`[P C, ...]` by peer, sent -> `[P C, ...]` by peer, received."""
        return jax.lax.all_to_all(buffer, "expert", 0, 0, tiled=True)

    back = there


def local_experts(travel, extra=None):
    """What each received row is: its expert among mine (E/P where the row is empty), and `extra [M]` int32 of it."""
    each = travel.experts // travel.on.peers
    names = [travel.plan.expert] + ([] if extra is None else [extra])
    got = travel.there(jnp.stack(names, axis=-1).astype(jnp.int32))
    mine = got[:, 0] - jax.lax.axis_index("expert") * each
    expert = jnp.where((mine >= 0) & (mine < each), mine, each)
    return expert, None if extra is None else got[:, 1]


def received(travel, buffer, expert):
    """The rows that came, 0 where nobody wrote."""
    return _written(travel, travel.there(buffer), expert)


def returned(travel, rows, expert):
    """The rows' way home, and the sum of each token's. Masked too: so are the cotangents that come for empty rows."""
    return common.combine(travel.back(_written(travel, rows, expert)), travel.plan)


def _written(travel, rows, expert):
    each = travel.experts // travel.on.peers
    return jnp.where((expert < each).reshape(-1, *(1,) * (rows.ndim - 1)), rows, 0)


def project(x, W, parts, on, rows, share=(0, 1), *, travel_by=Padded):
    """See `base.py`; parts whose experts are not split are served at home."""
    home = [p for p in parts if not on.split(p.experts, p.routed)]
    y, counts = projection.project(W, x, home, rows, share), []
    for part in parts:
        if not on.split(part.experts, part.routed):
            counts.append(None)
            continue
        idx, gates = part.slots
        with jax.named_scope("dispatch"):
            travel = travel_by(idx, part.experts, on)
            expert, _ = local_experts(travel)
            gate = received(travel, common.send_slots(gates, travel.plan), expert)
        seen = lowrank.dropped(x, part.dropout, rows, share)
        hot = expert[:, None] == jnp.arange(part.factors.B.shape[0])
        weight = jnp.where(hot, gate[:, None], 0.0)
        if on.rank_space:
            out = _from_rank(travel, seen, idx, part.factors, expert, weight)
        else:
            with jax.named_scope("dispatch"):
                row = received(travel, common.send_tokens(seen, travel.plan), expert)
            out = lowrank.low_rank(row, part.factors, weight, None, (expert[:, None], gate[:, None]))
        with jax.named_scope("combine"):
            y = y + returned(travel, out, expert)
        counts.append(travel.plan.counts if on.capacity else None)
    return y, counts


def _from_rank(travel, x, idx, factors, expert, weight):
    """The exchange in rank space: `A x` at home, `[T, K, R]` travels, B (and mid) at the expert."""
    z = jnp.dot(x, factors.A.reshape(-1, factors.A.shape[-1]).T.astype(x.dtype), preferred_element_type=jnp.float32)
    z = lowrank.to_slots(z.reshape(len(x), *factors.A.shape[:2]), idx).astype(x.dtype)
    z = received(travel, common.send_slots(z, travel.plan), expert)[:, None].astype(jnp.float32)
    if factors.mid is not None:
        z = jnp.einsum("ter,eqr->teq", jnp.broadcast_to(z, (len(z), *factors.mid.shape[:2])), factors.mid)
    return lowrank.expand(z, factors.B, factors.scale * weight, x.dtype)


def feed_forward(x, g, u, weights, parts, on, rows, activation, share=(0, 1), z=None, *, travel_by=Padded):
    """See `base.py`. Home keeps the frozen h_0; every selected expert's whole FFN runs where the expert is."""
    home = [p for p in parts if not on.split(p.experts, p.routed)]
    away = [p for p in parts if on.split(p.experts, p.routed)]
    down = lambda h: lowrank.frozen_linear(weights["down"], h)  # noqa: E731
    h0 = ffn.ACTIVATIONS[activation](g) * u
    if home:
        mix, rest = ffn.apply(x, g, u, home, activation, down, rows, share)
    else:
        mix, rest = h0, jnp.zeros(x.shape, x.dtype)
    counts = {}
    for part in away:
        with jax.named_scope("dispatch"):
            travel = travel_by(part.idx, part.experts, on)
            plan = travel.plan
            expert, row_ids = local_experts(travel, rows[plan.token])
            gate = received(travel, common.send_slots(part.gates, plan), expert)
            row = received(travel, common.send_tokens(x, plan), expert)
        lost = jnp.sum(jnp.where((part.idx < part.experts) & ~plan.kept, part.gates, 0.0), axis=-1)
        mix = mix + ((part.base + lost - 1.0)[:, None] * h0).astype(mix.dtype)
        there = part.replace(idx=expert[:, None], gates=gate[:, None], base=jnp.zeros(len(row), bool))
        shared = [lowrank.frozen_linear(weights[s], row) for s in ("gate", "up")]
        mixed, more = ffn.apply(row, *shared, [there], activation, down, row_ids, share)
        with jax.named_scope("combine"):
            rest = rest + returned(travel, down(mixed) + more, expert)
        counts[id(part)] = plan.counts if on.capacity else None
    return mix, rest, [counts.get(id(p)) for p in parts]


def refuses(factors, *, place, latent: bool, on: Engine) -> str | None:
    """Why this engine cannot serve an adapter, None where it can. `factors`: shapes of one routed site."""
    if latent:
        return "its rank activations are changed by leaves that do not travel"
    if on.rank_space and not place.KEPT:
        return "an FFN's experts need the whole row of width D, so rank_space has nothing to ship"
    return place.stays(factors)


def bytes_moved(load, on: Engine) -> tuple[float, float]:
    """`(shipped, useful)` bytes of one device, layer and step; the useful rows are those of an even load."""
    rows = on.peers * common.rows_to_a_peer(load.T, load.K, on.padded(load.E), on.peers, on.capacity)
    return rows_moved(load, on, rows), load.K * load.T * 2 * (load.row_in + load.row_out) * (on.peers - 1) / on.peers


def rows_moved(load, on: Engine, rows: int, line: int = 1) -> float:
    """Bytes of `rows` rows (each in whole lines) exchanged in every pass, and of the gradients of what stays."""
    rank = on.rank_space and "A" in load.place.KEPT
    there, back = load.passes + 1, 2 if load.last else load.passes + 1
    sizes = {"row": load.rank_bytes if rank else load.row_in, "gate": 4, "ids": 4 * load.place.IDS}
    row, gate, ids, out = (-(-size // line) * line for size in (*sizes.values(), load.row_out))
    row = there * (row + gate) + back * out + load.passes * ids
    moved = rows * row * (on.peers - 1) / on.peers
    if not on.stored(load.E):  # gradients of a leaf that is stored whole are gathered again
        padded = sum(size for size, each, _ in load.leaves if each) * on.padded(load.E) / load.E
        moved += padded * (on.peers - 1) / on.peers
    return moved + load.shares(on) + load.sums(on, per_expert=False)
