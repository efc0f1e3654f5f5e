"""Attention over a prompt's slots beside a text's, with a softmax of its own (LLaMA-Adapter's zero-init attention).

    o_h = gate_h softmax(q_h K^T / sqrt(H_d)) V

It is added to what attention over the text gives. Prefix tuning has one softmax over both, in which a prompt takes
weight from the text; here gate_h = 0 leaves the text's attention as it is, whatever K and V are.
B batch, S sequence, H heads, H_kv key-value heads, H_d head size, N slots.
"""

import jax
import jax.numpy as jnp

from molora_jax.core.types import Array


def attend_prompt(q: Array, K: Array, V: Array, gate: Array) -> Array:
    """`q [B, S, H, H_d]`, `K, V [N, H_kv, H_d]`, `gate [H]` -> `[B, S, H * H_d]`, in float32.

    >>> import jax.numpy as jnp
    >>> q, K, V = jnp.ones((1, 1, 2, 4)), jnp.ones((3, 1, 4)), jnp.ones((3, 1, 4))
    >>> attend_prompt(q, K, V, jnp.array([0.0, 2.0]))[0, 0, ::4].tolist()
    [0.0, 2.0]
    """
    B, S, H, size = q.shape
    grouped = q.reshape(B, S, K.shape[1], -1, size).astype(jnp.float32)
    scores = jnp.einsum("bsgnd,lgd->bsgnl", grouped, K.astype(jnp.float32)) * size**-0.5
    out = jnp.einsum("bsgnl,lgd->bsgnd", jax.nn.softmax(scores, axis=-1), V.astype(jnp.float32))
    return (out.reshape(B, S, H, size) * gate[:, None]).reshape(B, S, -1)
