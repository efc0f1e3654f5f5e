"""What an objective asks of the distribution over the vocabulary, a chunk of positions at a time.

The logits of a whole batch, `[B, M, V]`, are the largest array of a step where the vocabulary is large: 4 rows of 512
targets and 152,000 tokens are 1.2 GB, and a softmax keeps them for its gradient. A token's value depends on its own
hidden state alone, so the forward pass of a chunk already knows the direction of its gradient, `u = d value / d hidden
[D]`; the backward multiplies it by what arrives. The logits of one chunk live at a time, nothing V-wide is kept, and no
product is made twice. A head that trains is the exception: its gradient needs what arrives before it can be summed, so
its chunks are formed again in the backward.

B batch, M targets a row, D width, V vocabulary.
"""

import functools
import math

import jax
import jax.numpy as jnp

from molora_jax.core.types import Array

CHUNK_BYTES = 2**27  # of float32 logits at a time, over all rows of the batch


def by_token(value, model, params: dict, hidden: Array, rest):
    """`value(logits_of, hidden, rest)` of every position, formed in chunks of positions.

    Args:
      value: `(logits_of, hidden [B, m, D], rest) -> (values [B, m] float32, aux)`; what a position gives depends on it
        alone, and no gradient passes `aux`. `logits_of(hidden) -> [B, m, V]` float32.
      params: of the model; those of its head alone are read.
      hidden: `[B, M, D]`. rest: arrays `[B, M, ...]`, through which no gradient passes.

    Returns:
      `(values [B, M], aux)`, leaves of aux `[B, M, ...]`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from molora_jax.backbones.families import TINY
      >>> from molora_jax.backbones.model import Model
      >>> from molora_jax.objectives.vocabulary import by_token
      >>> log_z = lambda logits_of, h, _: (jax.nn.logsumexp(logits_of(h), axis=-1), ())
      >>> params = {"embed": jnp.zeros((TINY.vocab, TINY.width))}
      >>> values, _ = by_token(log_z, Model(TINY), params, jnp.zeros((2, 3, TINY.width)), ())
      >>> values.shape, bool(jnp.allclose(values, jnp.log(TINY.vocab)))
      ((2, 3), True)
    """
    head = model.config.head(params)

    def of_chunk(head, hidden, rest):
        return value(functools.partial(model.logits, head), hidden, rest)

    chunks = count(hidden.shape[0], hidden.shape[1], model.config.vocab)
    if chunks == 1:
        return of_chunk(head, hidden, rest)
    return _chunked(of_chunk, chunks, head, hidden, jax.lax.stop_gradient(rest))


def count(rows: int, positions: int, vocab: int) -> int:
    """The least number of chunks whose logits take at most `CHUNK_BYTES`, or one position a chunk."""
    longest = max(1, CHUNK_BYTES // (4 * rows * vocab))
    return max(1, math.ceil(positions / longest))


def _cut(tree, chunks: int):
    """`[B, M, ...] -> [chunks, B, m, ...]`, the last chunk filled up with zeros."""

    def cut(x):
        B, M = x.shape[:2]
        m = math.ceil(M / chunks)
        x = jnp.pad(x, [(0, 0), (0, chunks * m - M), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(x.reshape(B, chunks, m, *x.shape[2:]), 1, 0)

    return jax.tree.map(cut, tree)


def _joined(tree, positions: int):
    """`[chunks, B, m, ...] -> [B, M, ...]`."""

    def join(x):
        return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :positions]

    return jax.tree.map(join, tree)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked(of_chunk, chunks, head, hidden, rest):
    parts = jax.lax.map(lambda part: of_chunk(head, *part), _cut((hidden, rest), chunks))
    return _joined(parts, hidden.shape[1])


def _forward(of_chunk, chunks, head, hidden, rest):
    trains = any(leaf.perturbed for leaf in jax.tree.leaves(head, is_leaf=lambda x: hasattr(x, "perturbed")))
    head, hidden, rest = jax.tree.map(
        lambda x: x.value, (head, hidden, rest), is_leaf=lambda x: hasattr(x, "perturbed")
    )

    def one(part):
        hidden, rest = part
        values, slope, aux = jax.vjp(lambda hidden: of_chunk(head, hidden, rest), hidden, has_aux=True)
        return (values, aux), slope(jnp.ones_like(values))[0]

    out, slopes = jax.lax.map(one, _cut((hidden, rest), chunks))
    M = hidden.shape[1]
    kept = (head, hidden) if trains else None
    return _joined(out, M), (_joined(slopes, M), rest, kept)


def _backward(of_chunk, chunks, residuals, arrived):
    slopes, rest, kept = residuals
    arrived = arrived[0]
    of_hidden = (slopes * arrived[..., None]).astype(slopes.dtype)
    of_head = None
    if kept is not None:
        head, hidden = kept

        def add(total, part):
            hidden, rest, arrived = part
            slope = jax.vjp(lambda head: of_chunk(head, hidden, rest)[0], head)[1]
            return jax.tree.map(jnp.add, total, slope(arrived)[0]), None

        zero = jax.tree.map(jnp.zeros_like, head)
        of_head, _ = jax.lax.scan(add, zero, _cut((hidden, rest, arrived), chunks))
    return of_head, of_hidden, None


_chunked.defvjp(_forward, _backward, symbolic_zeros=True)
