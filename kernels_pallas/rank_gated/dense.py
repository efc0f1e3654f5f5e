"""All experts' A in one product, gates applied in rank space, all experts' B in one product.

    z = x A^T  [T, E*R];   u = g * z by blocks of R;   y = u B

No sort, no gather, no drops, exact for any gates; 6 T E R (D_in + D_out) FLOPs forward and backward. The derivative is
written out because XLA:CPU otherwise transposes dy inside a fused loop (a quarter of a training step, measured), and
to save only x and z. `where` instead of a product by zero: a row of x whose gates are all 0 may hold anything, NaN
included, and reaches neither y nor dA. Its own dgates are then 0 where they are not finite; every other gate of 0 keeps
its derivative, `dy_t B_e A_e x_t`.
"""

import jax
import jax.numpy as jnp

from kernels_pallas.zeros import gated

F32 = jnp.float32


def _dot(a, b, contract, dtype):
    return jax.lax.dot_general(a, b, (contract, ((), ())), preferred_element_type=F32).astype(dtype)


@jax.named_scope("shrink")
def _shrink(x, A):
    z = _dot(x, A.reshape(-1, A.shape[-1]).astype(x.dtype), ((1,), (1,)), F32)
    return z.reshape(len(x), A.shape[0], A.shape[1])


@jax.custom_vjp
def rank_gated(x, A, B, gates):
    """`x [T, D_in]`, `A [1|E, R, D_in]`, `B [E, R, D_out]`, `gates [T, E]` -> `[T, D_out]` in x's dtype."""
    return _forward(x, A, B, gates)[0]


def _forward(x, A, B, gates):
    z = _shrink(x, A)
    with jax.named_scope("expand"):
        u = gated(gates[..., None], z).reshape(len(x), -1).astype(x.dtype)
        y = _dot(u, B.reshape(-1, B.shape[-1]).astype(x.dtype), ((1,), (0,)), x.dtype)
    return y, (x, z, A, B, gates)


def _backward(saved, dy):
    x, z, A, B, gates = saved
    E, R = B.shape[:2]
    on = jnp.any(gates != 0, axis=1, keepdims=True)
    with jax.named_scope("expand"):
        u = gated(gates[..., None], z).reshape(len(x), -1).astype(x.dtype)
        dB = _dot(u, dy, ((0,), (0,)), B.dtype).reshape(B.shape)
        du = _dot(dy, B.reshape(-1, B.shape[-1]).astype(x.dtype), ((1,), (1,)), F32).reshape(len(x), E, R)
        dgates = jnp.sum(du * z, axis=-1)
        dgates = jnp.where(on | jnp.isfinite(dgates), dgates, 0.0).astype(gates.dtype)
    with jax.named_scope("shrink"):
        dz = gated(gates[..., None], du)
        if A.shape[0] == 1:
            dz = jnp.sum(dz, axis=1, keepdims=True)
        dz = dz.reshape(len(x), -1).astype(x.dtype)
        dA = _dot(dz, jnp.where(on, x, 0), ((0,), (0,)), A.dtype).reshape(A.shape)
        dx = _dot(dz, A.reshape(-1, A.shape[-1]).astype(x.dtype), ((1,), (0,)), x.dtype)
    return dx, dA, dB, dgates


rank_gated.defvjp(_forward, _backward)
