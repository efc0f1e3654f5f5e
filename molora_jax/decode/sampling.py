"""How the next token is taken from the logits: a penalty for repeats, temperature, top-k, top-p, min-p, in this order.

As transformers' logits processors of the same names do it. A filter that is off is not in the dict of settings, so it
costs nothing: the dict's keys are part of the compiled program, its values are not. A value is a scalar, or `[B]`: each
row's own, where the value that is off changes no row.

B rows, V vocabulary.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from molora_jax.core.types import Array
from molora_jax.errors import InputError

RANGES = {  # name: (the value that is off, what is allowed, in words)
    "top_p": (1.0, lambda x: 0 < x <= 1, "above 0, at most 1 (off)"),
    "top_k": (0, lambda x: 0 <= x < 2**31, "0 (off) or more"),
    "min_p": (0.0, lambda x: 0 <= x < 1, "0 (off) to below 1"),
    "repetition_penalty": (1.0, lambda x: 1e-3 <= x <= 1e3, "0.001 to 1000 (1 is off)"),
}


def settings(*, temperature: float, **given) -> dict[str, np.ndarray]:
    """The filters that are on, by name, as float32 scalars (`top_k`: int32).

    Raises:
      InputError: a value out of range, or a filter of draws at temperature 0, where nothing is drawn.
    """
    out = {}
    for name, value in given.items():
        off, allowed, words = RANGES[name]
        whole = name == "top_k"
        kinds = (int, np.integer) if whole else (int, float, np.integer, np.floating)
        if isinstance(value, bool) or not isinstance(value, kinds) or not _finite(value) or not allowed(value):
            raise InputError(name, got=shown(value), expected=("an integer, " if whole else "a number ") + words)
        if value == off:
            continue
        if temperature == 0 and name != "repetition_penalty":
            raise InputError(
                name, got=f"{value!r} at temperature 0", expected="a temperature above 0",
                fix="At temperature 0 the likeliest token is taken: give a temperature, or leave this out.",
            )  # fmt: skip
        out[name] = np.int32(value) if whole else np.float32(value)
    return out


def _finite(value) -> bool:
    """An integer always is, also one that no float holds."""
    return isinstance(value, (int, np.integer)) or math.isfinite(value)


def shown(value) -> str:
    """A wrong value, for an error."""
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, int) and value.bit_length() > 128:  # Python writes no integer of very many digits
        return f"an integer of {value.bit_length():,} bits"
    return f"{value!r:.80}"


def seen_in(tokens: Array, lengths: Array, vocab: int) -> Array:
    """`[B, V]` bool: which ids stand in the first `lengths` of `tokens [B, S]`."""
    B, S = tokens.shape
    inside = jnp.arange(S) < lengths[:, None]
    return (
        jnp.zeros((B, vocab), bool).at[jnp.arange(B)[:, None], jnp.where(inside, tokens, vocab)].set(True, mode="drop")
    )


def penalised(logits: Array, seen: Array, penalty) -> Array:
    """Logits `[B, V]` of ids that were seen, divided by the penalty (multiplied where negative)."""
    penalty = by_row(penalty)
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def filtered(logits: Array, filters: dict) -> Array:
    """Logits `[B, V]` (after the temperature) with what top-k, top-p and min-p leave out at minus infinity."""
    if "top_k" in filters:
        V, k = logits.shape[-1], by_row(filters["top_k"])
        place = jnp.broadcast_to(V - jnp.where(k == 0, V, jnp.minimum(k, V)), (len(logits), 1))
        least = jnp.take_along_axis(jnp.sort(logits, axis=-1), place, axis=-1)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if "top_p" in filters:
        order = jnp.argsort(logits, axis=-1)
        below = jnp.cumsum(jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1), axis=-1)
        out = (below <= 1 - by_row(filters["top_p"])).at[:, -1].set(False)
        logits = jnp.where(jnp.take_along_axis(out, jnp.argsort(order, axis=-1), axis=-1), -jnp.inf, logits)
    if "min_p" in filters:
        probability = jax.nn.softmax(logits, axis=-1)
        logits = jnp.where(
            probability < by_row(filters["min_p"]) * jnp.max(probability, axis=-1, keepdims=True), -jnp.inf, logits
        )
    return logits


def by_row(value) -> Array:
    """A scalar, or `[B]` as `[B, 1]`."""
    return jnp.asarray(value)[..., None]


def drawn(logits: Array, keys: Array, t: Array) -> Array:
    """Token `t [B]` of each row's answer `[B]`, drawn from `logits [B, V]` with the row's own key of `keys [B, 2]`."""
    draw = lambda key, t, z: jax.random.categorical(jax.random.fold_in(key, t), z)  # noqa: E731
    return jax.vmap(draw)(keys, t, logits)
