"""Frozen random bases that follow from one integer: the same entries on every device, backend and version of jax.

Entry (i, j) is a function of (seed, i, j) alone: the counter (i, j // 2) of Threefry-2x32 gives 64 bits, two numbers in
[-1, 1). So a part of a basis can be made anywhere, and a narrower one is the first columns of a wider one.
"""

import jax
import jax.extend
import jax.numpy as jnp

from molora_jax.core.types import Array


def uniform(seed: Array | int, rows: Array, columns: int) -> Array:
    """`[len(rows), columns]` float32, uniform in [-1, 1); `seed` an int32 number, `rows [N]` which of them.

    >>> import jax.numpy as jnp
    >>> wide = uniform(0, jnp.arange(3), 8)
    >>> bool((uniform(0, jnp.array([2]), 5) == wide[2:, :5]).all())
    True
    """
    half = -(-columns // 2)
    row = jnp.broadcast_to(rows.astype(jnp.uint32)[:, None], (len(rows), half))
    column = jnp.broadcast_to(jnp.arange(half, dtype=jnp.uint32), row.shape)
    key = jnp.stack([jnp.asarray(seed).astype(jnp.uint32), jnp.uint32(0)])
    a, b = jax.extend.random.threefry_2x32(key, jnp.stack([row, column]))
    bits = jnp.stack([a, b], axis=-1).reshape(len(rows), -1)[:, :columns]
    # 23 bits are the mantissa of a number in [1, 2)
    unit = jax.lax.bitcast_convert_type((bits >> 9) | jnp.uint32(0x3F800000), jnp.float32)
    return 2 * unit - 3
