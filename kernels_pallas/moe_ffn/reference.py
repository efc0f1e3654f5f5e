"""The routed FFN of a base that has experts of its own, written as it reads: every expert's hidden state in memory."""

import jax
import jax.numpy as jnp

from kernels_pallas.routed_ffn.reference import ACTIVATIONS


def clamped(g, u):
    """gpt-oss's two factors."""
    m = jnp.minimum(g, 7.0)
    return m * jax.nn.sigmoid(1.702 * m), jnp.clip(u, -7.0, 7.0) + 1


def moe_ffn(x, gate, up, down, low, idx, gates, *, activation="silu", mask=None, bias=None):
    E, gate_of = gate.shape[0], ACTIVATIONS.get(activation)
    hot = jax.nn.one_hot(idx, E, dtype=jnp.float32)  # a padded slot is all zero
    used = idx < E
    g, u = (jnp.einsum("tke,td,edf->tkf", hot, x, W) for W in (gate, up))
    if bias is not None:
        g, u = (y + jnp.einsum("tke,ef->tkf", hot, b) for y, b in ((g, bias[0]), (u, bias[1])))
    if low is not None:
        z_g, z_u, B_g, B_u, A_d = low
        spread = lambda z, B: jnp.einsum("tke,tkr,erf->tkf", hot, z, jnp.broadcast_to(B, (E, *B.shape[1:])))  # noqa: E731
        g, u = g + spread(z_g, B_g), u + spread(z_u, B_u)
    a, b = (gate_of(g), u) if activation != "clamped" else clamped(g, u)
    h, w = jnp.where(used[..., None], a * b, 0.0), jnp.where(used, gates, 0.0)
    y = jnp.einsum("tke,tk,tkf,efd->td", hot, w, h, down)
    y = y if bias is None else y + jnp.einsum("tke,tk,ed->td", hot, w, bias[2])
    if low is None:
        return y.astype(x.dtype), None
    h = h if mask is None else h * mask[:, None]
    z_d = jnp.einsum("tke,tkf,erf->tkr", hot, h, jnp.broadcast_to(A_d, (E, *A_d.shape[1:])))
    return y.astype(x.dtype), z_d.astype(x.dtype)
