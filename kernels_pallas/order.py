"""Slots in the order of their experts and back: two permutations, each the derivative of the other.

No atomics and no scatter: rows are gathered into their order, and each token's sum is K gathers in its own order.
T tokens, K slots of a token, N = T*K slots, E experts, D width.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class Order(NamedTuple):
    """`slot, expert [N]`: the slot at a sorted place and its expert (E, or more, where it is not used); `place [T, K]`:
    the sorted place of a slot; `used [T, K]` bool.

    `sizes [E]` int32: rows of each expert, in order; slots that are not used come after all of them.
    """

    slot: Array
    expert: Array
    place: Array
    used: Array
    sizes: Array

    @property
    def token(self) -> Array:
        return self.slot // self.place.shape[1]


def by_expert(idx: Array, E: int) -> Order:
    """The order of `idx [T, K]` int32 (E, or more, at a slot that is not used)."""
    slots = jnp.arange(idx.size, dtype=jnp.int32)
    expert, slot = jax.lax.sort((idx.reshape(-1), slots), num_keys=1)  # stable
    place = jax.lax.sort((slot, slots), num_keys=1)[1].reshape(idx.shape)
    bounds = jnp.searchsorted(expert, jnp.arange(E + 1, dtype=expert.dtype)).astype(jnp.int32)
    return Order(slot, expert, place, idx < E, bounds[1:] - bounds[:-1])


def spread(x: Array, order: Order) -> Array:
    """Each slot's token, `x [T, D]` -> `[N, D]`."""
    return _spread(x, order.token, order.place, order.used)


def arrange(z: Array, order: Order) -> Array:
    """Each slot's own row, `z [T, K, D]` -> `[N, D]`."""
    rows = z.reshape(-1, z.shape[-1])
    return _spread(rows, order.slot, order.place.reshape(-1, 1), order.used.reshape(-1, 1))


def combine(y: Array, order: Order) -> Array:
    """The sum of a token's slots in use, `y [N, D]` -> `[T, D]`; summed in float32."""
    return _combine(y, order.token, order.place, order.used)


def restore(z: Array, order: Order) -> Array:
    """Back to the slots, `z [N, D]` -> `[T, K, D]`, 0 at a slot that is not used."""
    rows = _combine(z, order.slot, order.place.reshape(-1, 1), order.used.reshape(-1, 1))
    return rows.reshape(*order.place.shape, -1)


@jax.custom_vjp
def _spread(x, source, place, used):
    return x[source]


def _spread_backward(saved, dy):
    place, used = saved
    return _sum(dy, place, used).astype(dy.dtype), None, None, None


_spread.defvjp(lambda x, source, place, used: (x[source], (place, used)), _spread_backward)


def _sum(y, place, used):
    """`sum_k y[place_tk]` over the slots in use, in token order, float32."""
    total = 0.0
    for k in range(place.shape[1]):
        total = total + jnp.where(used[:, k, None], y[place[:, k]].astype(jnp.float32), 0.0)
    return total


@jax.custom_vjp
def _combine(y, source, place, used):
    return _sum(y, place, used).astype(y.dtype)


def _combine_backward(source, dy):
    return dy[source], None, None, None


_combine.defvjp(lambda y, source, place, used: (_combine(y, source, place, used), source), _combine_backward)
