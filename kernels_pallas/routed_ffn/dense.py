"""The routed FFN in pure XLA, one slot at a time: never `[T, K, F]` in memory, forward or backward.

A slot's `dg_k = z_g[k] B_g[e_k]` is one product of width E*R with the other experts' columns at zero, so the cost of the
rank-R products grows with E; the element-wise work does not. The backward recomputes each h_k.
"""

import functools

import jax
import jax.numpy as jnp

F32 = jnp.float32


def _spread(z, idx, E):
    """`z [T, R]` into its expert's columns: `[T, E*R]`."""
    hot = idx[:, None] == jnp.arange(E)
    return jnp.where(hot[..., None], z[:, None, :], 0).reshape(len(z), -1)


def _collect(wide, idx, E):
    """The expert's columns out of `[T, E*R]`: `[T, R]`; a padded slot gets 0."""
    hot = idx[:, None] == jnp.arange(E)
    return jnp.sum(jnp.where(hot[..., None], wide.reshape(len(wide), E, -1), 0), axis=1)


def _flat(x, dtype):
    return x.reshape(-1, x.shape[-1]).astype(dtype)


def _activate(activation, g):
    """`act(g)` and its derivative, in float32."""
    g = g.astype(F32)
    if activation == "silu":
        s = jax.nn.sigmoid(g)
        return g * s, s * (1 + g * (1 - s))
    return jax.vjp(jax.nn.gelu, g)[0], jax.jvp(jax.nn.gelu, (g,), (jnp.ones_like(g),))[1]


def _hidden(activation, g, u, z_g, z_u, B_g, B_u, idx_k):
    """`a = act(g_k)`, its derivative, `u_k` of one slot, float32; `h_k = a * u_k`."""
    E = B_g.shape[0]
    g_k = g + jnp.dot(_spread(z_g, idx_k, E).astype(g.dtype), _flat(B_g, g.dtype), preferred_element_type=F32)
    u_k = u + jnp.dot(_spread(z_u, idx_k, E).astype(u.dtype), _flat(B_u, u.dtype), preferred_element_type=F32)
    return *_activate(activation, g_k), u_k.astype(F32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _op(activation, g, u, z_g, z_u, B_g, B_u, A_d, idx, gates, base, mask):
    return _forward(activation, g, u, z_g, z_u, B_g, B_u, A_d, idx, gates, base, mask)[0]


def _forward(activation, g, u, z_g, z_u, B_g, B_u, A_d, idx, gates, base, mask):
    E, K = B_g.shape[0], idx.shape[1]
    A_all = jnp.broadcast_to(A_d, (E, *A_d.shape[1:]))
    a, _ = _activate(activation, g)
    mix = base[:, None] * (a * u.astype(F32))
    z_d = []
    for k in range(K):
        a, _, u_k = _hidden(activation, g, u, z_g[:, k], z_u[:, k], B_g, B_u, idx[:, k])
        h = a * u_k
        w = jnp.where(idx[:, k] < E, gates[:, k], 0.0)
        mix = mix + w[:, None] * h
        seen = (h if mask is None else h * mask).astype(g.dtype)
        wide = jnp.dot(seen, _flat(A_all, g.dtype).T, preferred_element_type=F32)
        z_d.append(_collect(wide, idx[:, k], E))
    out = mix.astype(g.dtype), jnp.stack(z_d, 1).astype(g.dtype)
    return out, (g, u, z_g, z_u, B_g, B_u, A_d, idx, gates, base, mask)


def _backward(activation, saved, cotangents):
    g, u, z_g, z_u, B_g, B_u, A_d, idx, gates, base, mask = saved
    dmix, dz_d = cotangents
    E, K, dtype = B_g.shape[0], idx.shape[1], g.dtype
    A_all = _flat(jnp.broadcast_to(A_d, (E, *A_d.shape[1:])), dtype)
    dmix32 = dmix.astype(F32)
    a, da = _activate(activation, g)
    u32 = u.astype(F32)
    dbase = jnp.sum(dmix32 * a * u32, axis=-1)
    dg = base[:, None] * dmix32 * da * u32
    du = base[:, None] * dmix32 * a
    dB_g = dB_u = dA = 0.0
    dz_g, dz_u, dgates = [], [], []
    for k in range(K):
        i = idx[:, k]
        a, da, u_k = _hidden(activation, g, u, z_g[:, k], z_u[:, k], B_g, B_u, i)
        h = a * u_k
        used = i < E
        w = jnp.where(used, gates[:, k], 0.0)
        dgates.append(jnp.where(used, jnp.sum(dmix32 * h, axis=-1), 0.0))
        wide = _spread(dz_d[:, k], i, E)  # [T, E*R]
        dseen = jnp.dot(wide, A_all, preferred_element_type=F32)
        seen = h if mask is None else h * mask
        dA = dA + jax.lax.dot_general(wide, seen.astype(dtype), (((0,), (0,)), ((), ())), preferred_element_type=F32)
        dh = w[:, None] * dmix32 + (dseen if mask is None else dseen * mask)
        # a padded slot's h is the base's, so its share must not reach g and u
        dg_k = jnp.where(used[:, None], dh * da * u_k, 0.0)
        du_k = jnp.where(used[:, None], dh * a, 0.0)
        dg, du = dg + dg_k, du + du_k
        for dk, z, B, dz in ((dg_k, z_g, B_g, dz_g), (du_k, z_u, B_u, dz_u)):
            dk = dk.astype(dtype)
            back = jnp.dot(dk, _flat(B, dtype).T, preferred_element_type=F32)
            dz.append(_collect(back, i, E))
            part = jax.lax.dot_general(
                _spread(z[:, k], i, E).astype(dtype), dk, (((0,), (0,)), ((), ())), preferred_element_type=F32
            )
            if B is B_g and dz is dz_g:
                dB_g = dB_g + part
            else:
                dB_u = dB_u + part
    dA = dA.reshape(E, *A_d.shape[1:])
    dA = dA if A_d.shape[0] == E else jnp.sum(dA, axis=0, keepdims=True)
    return (
        dg.astype(dtype),
        du.astype(dtype),
        jnp.stack(dz_g, 1).astype(z_g.dtype),
        jnp.stack(dz_u, 1).astype(z_u.dtype),
        dB_g.reshape(B_g.shape).astype(B_g.dtype),
        dB_u.reshape(B_u.shape).astype(B_u.dtype),
        dA.astype(A_d.dtype),
        None,
        jnp.stack(dgates, 1).astype(gates.dtype),
        dbase.astype(base.dtype),
        None,
    )


_op.defvjp(_forward, _backward)


def routed_ffn(g, u, z_g, z_u, B_g, B_u, A_d, idx, gates, base, *, activation="silu", mask=None):
    return _op(activation, g, u, z_g, z_u, B_g, B_u, A_d, idx, gates, base, mask)
