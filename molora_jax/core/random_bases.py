"""Frozen random bases that follow from one integer: the same entries on every device, backend and version of jax.

Entry (i, j) of a stream is a function of (seed, stream, i, j) alone: the counter (i, j // 2) of Threefry-2x32 gives 64
bits, two numbers in [-1, 1). So a part of a basis can be made anywhere, and a narrower one is the first columns of a
wider one. N matrices, each flat of M entries; E experts, each with coefficients of its own.
"""

import functools

import jax
import jax.extend
import jax.numpy as jnp

from molora_jax.core.types import Array

EXACT = jax.lax.Precision.HIGHEST  # of float32 on every backend: factors are rebuilt from their coefficients


def uniform(seed: Array | int, rows: Array, columns: int, *, stream: int = 0) -> Array:
    """`[len(rows), columns]` float32, uniform in [-1, 1); `seed` an int32 number, `rows [N]` which of them.

    >>> import jax.numpy as jnp
    >>> wide = uniform(0, jnp.arange(3), 8)
    >>> bool((uniform(0, jnp.array([2]), 5) == wide[2:, :5]).all())
    True
    """
    half = -(-columns // 2)
    row = jnp.broadcast_to(rows.astype(jnp.uint32)[:, None], (len(rows), half))
    column = jnp.broadcast_to(jnp.arange(half, dtype=jnp.uint32), row.shape)
    key = jnp.stack([jnp.asarray(seed).astype(jnp.uint32), jnp.uint32(stream)])
    a, b = jax.extend.random.threefry_2x32(key, jnp.stack([row, column]))
    bits = jnp.stack([a, b], axis=-1).reshape(len(rows), -1)[:, :columns]
    # 23 bits are the mantissa of a number in [1, 2)
    unit = jax.lax.bitcast_convert_type((bits >> 9) | jnp.uint32(0x3F800000), jnp.float32)
    return 2 * unit - 3


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def combination(coefficients: Array, seed: Array, columns: int, stream: int, chunk: int) -> Array:
    """`sum_i c_ei basis_i`, `[E, M]`, of matrices `uniform(seed, i, M)`, which are made `chunk` at a time and dropped.

    The backward pass makes them again, so that the memory is that of one chunk whatever N is. `coefficients [E, N]`,
    `columns` M; `seed` an int32 number.

    >>> import jax.numpy as jnp
    >>> c = jnp.array([[1.0, 0.0, 2.0]])
    >>> whole = c @ uniform(5, jnp.arange(3), 4)
    >>> bool(jnp.allclose(combination(c, jnp.int32(5), 4, 0, 2), whole))
    True
    """
    return _sum(coefficients, seed, columns, stream, chunk)


def _chunk(seed, at, columns, stream, chunk):
    return uniform(seed, at * chunk + jnp.arange(chunk), columns, stream=stream)


_compiled = functools.partial(jax.jit, static_argnums=(2, 3, 4))  # once for all projections of one shape


@_compiled
def _sum(coefficients, seed, columns, stream, chunk):
    E, N = coefficients.shape
    chunks = -(-N // chunk)
    padded = jnp.pad(coefficients, ((0, 0), (0, chunks * chunk - N))).reshape(E, chunks, chunk)

    def add(total, part):
        at, own = part
        return total + jnp.dot(own, _chunk(seed, at, columns, stream, chunk), precision=EXACT), None

    total = jnp.zeros((E, columns), coefficients.dtype)
    return jax.lax.scan(add, total, (jnp.arange(chunks), jnp.swapaxes(padded, 0, 1)))[0]


@_compiled
def _inner_products(g, seed, chunks, stream, chunk):
    """`<g_e, basis_i>`, `[E, chunks * chunk]`."""

    def inner(_, at):
        return None, jnp.dot(g, _chunk(seed, at, g.shape[1], stream, chunk).T, precision=EXACT)

    parts = jax.lax.scan(inner, None, jnp.arange(chunks))[1]  # [chunks, E, chunk]
    return jnp.swapaxes(parts, 0, 1).reshape(len(g), -1)


def _forward(coefficients, seed, columns, stream, chunk):
    return combination(coefficients, seed, columns, stream, chunk), (seed, coefficients.shape[1])


def _backward(columns, stream, chunk, kept, g):
    seed, N = kept
    return _inner_products(g, seed, -(-N // chunk), stream, chunk)[:, :N], None


combination.defvjp(_forward, _backward)
