"""The routed FFN of a base that has experts of its own, written as it reads: every expert's hidden state in memory."""

import jax
import jax.numpy as jnp

from kernels_pallas.routed_ffn.reference import ACTIVATIONS


def moe_ffn(x, gate, up, down, low, idx, gates, *, activation="silu", mask=None):
    act, E = ACTIVATIONS[activation], gate.shape[0]
    hot = jax.nn.one_hot(idx, E, dtype=jnp.float32)  # a padded slot is all zero
    used = idx < E
    g, u = (jnp.einsum("tke,td,edf->tkf", hot, x, W) for W in (gate, up))
    if low is not None:
        z_g, z_u, B_g, B_u, A_d = low
        spread = lambda z, B: jnp.einsum("tke,tkr,erf->tkf", hot, z, jnp.broadcast_to(B, (E, *B.shape[1:])))  # noqa: E731
        g, u = g + spread(z_g, B_g), u + spread(z_u, B_u)
    h = jnp.where(used[..., None], act(g) * u, 0.0)
    y = jnp.einsum("tke,tk,tkf,efd->td", hot, jnp.where(used, gates, 0.0), h, down)
    if low is None:
        return y.astype(x.dtype), None
    h = h if mask is None else h * mask[:, None]
    z_d = jnp.einsum("tke,tkf,erf->tkr", hot, h, jnp.broadcast_to(A_d, (E, *A_d.shape[1:])))
    return y.astype(x.dtype), z_d.astype(x.dtype)
