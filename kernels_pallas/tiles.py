"""The schedule of a grouped product in pure XLA: slots sorted by expert, every expert's rows cut into whole tiles.

A tile holds up to M slots of one expert, so a step of the loop over tiles is a few small dense products with that
expert's factors, and the cost grows with T*K and not with E. Only the tiles that hold a slot are visited (`count`),
hence nothing is dropped and an empty expert costs nothing; the static bound is ceil(T*K / M) + min(E, T*K) tiles.

T tokens, K slots of a token, N = T*K slots, E experts, M rows of a tile, R rank.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_batching import custom_vmap

from kernels_pallas.platform import is_side_by_side, platform_of
from kernels_pallas.quantised import dense

Array = jax.Array
PRODUCT = "product"  # the name of what a grouped product returns, for the policies of `jax.checkpoint`


class Tiles(NamedTuple):
    """`n` tiles of M rows; `count` of them, the first, are in use.

    `expert [n]`; `slot, token [n, M]` where a row reads from (any place that exists where no slot is);
    `to_slot, to_token [n, M]` where it writes to (past the end where no slot is, to be dropped; rising within a tile,
    so writes never meet); `valid [n, M, 1]`.
    """

    expert: Array
    slot: Array
    token: Array
    to_slot: Array
    to_token: Array
    valid: Array
    count: Array


class InStack(NamedTuple):
    """A layer's factors `[E, R, D]` in the stack of all layers: a tile reads its expert from there.

    A layer's slice of the stack would be a copy of all its experts, forward and backward, whoever is used. Here `part`
    [E, R, D] is that slice and only receives the gradient, so nobody reads it and the compiler leaves it out. `stack
    [L, E, R, D]` must be a constant for autodiff; `layer` int32 is the place in it.
    """

    part: Array | None
    stack: Array
    layer: Array

    @property
    def shape(self):
        return self.stack.shape[1:]

    @property
    def dtype(self):
        return self.stack.dtype


Factor = Array | InStack


def plain(A: Factor) -> Array:
    """`[E, R, D]`, for a form that multiplies with all experts."""
    return A.part if isinstance(A, InStack) else A


def expert(A: Factor, e: Array) -> Array:
    """`[R, D]` of expert e, a traced scalar in range (`[F]` of a bias); dense, of a quantised kernel."""

    def own(stack):
        inside = stack.shape[2:]
        return jax.lax.dynamic_slice(stack, (A.layer, e, *(0,) * len(inside)), (1, 1, *inside)).reshape(inside)

    return dense(jax.tree.map(own, A.stack) if isinstance(A, InStack) else jax.tree.map(lambda a: at(a, e), A))


def kept(A: Factor) -> Factor:
    """What a backward pass has to remember."""
    return A._replace(part=None) if isinstance(A, InStack) else A


def gradient(A: Factor, d: Array) -> Factor:
    """The cotangent of A from that of `[E, R, D]`."""
    d = d.astype(A.dtype)
    return InStack(d, None, None) if isinstance(A, InStack) else d


def rows_per_tile(num_slots: int, E: int) -> int:
    """The next power of two above an expert's mean load, 32 at most.

    Measured on a CPU at F 1536, R 16: 32 rows keep the temporaries of a tile in a 2 MB cache and waste few rows at the
    end of an expert; with 8 slots an expert, tiles of 8 beat tiles of 16 (docs/performance.md). On a GPU a turn of the
    loop takes 90 us however few its rows (an H200), so a tile there holds an expert's whole mean load, up to 1,024.
    """
    mean = -(-num_slots // max(E, 1))
    most = 1024 if platform_of() == "gpu" else 32
    return min(most, 1 << (mean - 1).bit_length()) if mean > 1 else 1


@jax.named_scope("dispatch")
def plan(idx: Array, E: int, rows: int | None = None) -> Tiles:
    """The schedule for `idx [T, K]` int32 (E, or more, at a slot that is not used)."""
    T, K = idx.shape
    N = T * K
    M = rows or rows_per_tile(N, E)
    n = -(-N // M) + min(E, N)
    expert, slot = jax.lax.sort((idx.reshape(-1), jnp.arange(N, dtype=jnp.int32)), num_keys=1)  # stable
    start = jnp.searchsorted(expert, jnp.arange(E + 1, dtype=idx.dtype)).astype(jnp.int32)
    tiles = -(-(start[1:] - start[:-1]) // M)
    end = jnp.cumsum(tiles)
    of = jnp.searchsorted(end, jnp.arange(n, dtype=end.dtype), side="right").astype(jnp.int32)  # E past the last tile
    e = jnp.minimum(of, E - 1)
    first = jnp.arange(n, dtype=jnp.int32) - (end - tiles)[e]  # the tile's number within its expert
    place = (start[e] + first * M)[:, None] + jnp.arange(M, dtype=jnp.int32)
    valid = (of < E)[:, None] & (place < start[e + 1][:, None])
    slot = slot[jnp.clip(place, 0, N - 1)]
    beyond = jnp.arange(M, dtype=jnp.int32)
    return Tiles(
        expert=e,
        slot=slot,
        token=slot // K,
        to_slot=jnp.where(valid, slot, N + beyond),
        to_token=jnp.where(valid, slot // K, T + beyond),
        valid=valid[..., None],
        count=end[-1].astype(jnp.int32),
    )


def step(schedule: Tiles, i: Array) -> Tiles:
    """Tile i alone: the leading axis is gone, `expert` is a scalar."""
    return Tiles(*(at(part, i) for part in schedule[:-1]), count=schedule.count)


def loop(count: Array, step, carry):
    """`step(i, carry)` for every tile in use.

    The result has a name because `jax.checkpoint` asks its policy about that, but never about a while loop: without it
    the backward ran every forward loop again, whatever the policy said (measured: a twelfth of a MixLoRA step).
    """
    return checkpoint_name(jax.lax.fori_loop(0, count, step, carry), PRODUCT)


def one_by_one(function, *arrays):
    """`function(*arrays)`, what a loop over tiles makes; of several runs under `jax.vmap` (`platform.side_by_side`) one
    run after the other.

    Batched, the loop would take every run's turns in all runs and carry all their buffers through a `where` in each
    (measured, the routed FFN of two runs: 500 ms, one after the other 82, all experts in dense products 248). An
    `InStack` of a batched stack stays one: `[runs, L, ...]` is read as a stack of `runs * L` layers.
    """
    if not is_side_by_side():
        return function(*arrays)
    run = custom_vmap(function)

    @run.def_vmap
    def rule(runs, batched, *arrays):
        def of(run):
            def pick(has, array):
                if isinstance(array, InStack):
                    layer = at(array.layer, run) if has.layer else array.layer
                    if not any(jax.tree.leaves(has.stack)):
                        return InStack(None, array.stack, layer)
                    L = array.stack.shape[1]
                    return InStack(None, array.stack.reshape(-1, *array.stack.shape[2:]), layer + run * L)
                return at(array, run) if has else array

            return function(*jax.tree.map(pick, tuple(batched), arrays, is_leaf=lambda x: isinstance(x, InStack)))

        out = jax.lax.map(of, jnp.arange(runs))
        return out, jax.tree.map(lambda _: True, out)

    return jax.tree.map(lambda made: checkpoint_name(made, PRODUCT), run(*arrays))


def rows_where(need: Array, function, arrays: tuple[Array, ...], outs: tuple[Array, ...]) -> tuple[Array, ...]:
    """`function(*rows of arrays) -> rows of outs`, in blocks of consecutive rows of which one is needed.

    `need [T]` bool; `arrays, outs [T, ...]`. The other blocks keep what `outs` has, at no cost.
    """
    T = len(need)
    M = min(32, T)
    starts = jnp.minimum(jnp.arange(-(-T // M)) * M, T - M)  # the last block may repeat rows: they are set, not added
    needed = jnp.any(need[starts[:, None] + jnp.arange(M)], axis=1)
    order = starts[jnp.argsort(~needed, stable=True)]

    def step(i, outs):
        rows = [jax.lax.dynamic_slice_in_dim(a, at(order, i), M) for a in arrays]
        put = lambda out, new: jax.lax.dynamic_update_slice_in_dim(out, new, at(order, i), axis=0)  # noqa: E731
        return tuple(map(put, outs, function(*rows)))

    return jax.lax.fori_loop(0, jnp.sum(needed), step, outs)


def at(x: Array, i: Array) -> Array:
    """`x[i]` for a traced scalar that is in range."""
    return jax.lax.dynamic_index_in_dim(x, i, axis=0, keepdims=False)


def take(x: Array, i: Array) -> Array:
    """Rows of x at indices that are in range."""
    return jnp.asarray(x).at[i].get(mode="promise_in_bounds")


def add_rows(x: Array, i: Array, rows: Array) -> Array:
    """Adds rows at distinct rising indices; those past the end are dropped.

    Tiles come one after the other, so a token's sum is taken in the order of its experts: no atomics, same bits again.
    """
    return x.at[i].add(rows, mode="drop", unique_indices=True, indices_are_sorted=True)


def add_at(x: Array, i: Array, part: Array) -> Array:
    """`x[i] += part` for a traced scalar, in place inside a loop."""
    return jax.lax.dynamic_update_index_in_dim(x, at(x, i) + part, i, axis=0)


def zeros(*shapes: tuple[int, ...]) -> list[Array]:
    """Float32 accumulators for a loop, each from a scalar of its own.

    XLA shares equal constants: the loop would begin by copying the shared buffer once an accumulator (measured: a
    tenth of the backward), and a scan over layers would hoist it.
    """
    return [jnp.broadcast_to(jax.lax.optimization_barrier(jnp.float32(0)), shape) for shape in shapes]
