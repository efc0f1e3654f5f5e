"""The routed FFN between its shared projections, written as it reads: `[T, K, F]` in memory.

What stands at an unused slot is not read.
"""

import functools

import jax
import jax.numpy as jnp

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


def routed_ffn(g, u, z_g, z_u, B_g, B_u, A_d, idx, gates, base_gate, *, activation="silu", mask=None):
    act = ACTIVATIONS[activation]
    E = B_g.shape[0]
    hot = jax.nn.one_hot(idx, E, dtype=jnp.float32)  # a padded slot is all zero
    used = idx < E
    gates, z_g, z_u = (jnp.where(used.reshape(used.shape + (1,) * (a.ndim - 2)), a, 0) for a in (gates, z_g, z_u))
    h0 = act(g) * u
    hk = act(g[:, None] + jnp.einsum("tke,tkr,erf->tkf", hot, z_g, B_g)) * (
        u[:, None] + jnp.einsum("tke,tkr,erf->tkf", hot, z_u, B_u)
    )
    mix = base_gate[:, None] * h0 + jnp.einsum("tk,tkf->tf", gates, hk)
    seen = hk if mask is None else hk * mask[:, None]
    shared = jnp.broadcast_to(A_d, (E, *A_d.shape[1:]))
    z_d = jnp.einsum("tke,tkf,erf->tkr", hot, seen, shared)
    return mix.astype(g.dtype), jnp.where(used[..., None], z_d, 0).astype(g.dtype)
