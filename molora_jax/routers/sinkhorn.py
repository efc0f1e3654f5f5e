"""Sinkhorn routing: in training the choice is the best of a balanced matrix (S-BASE, Clark et al. 2022, 2202.01169).

    Q = diag(a) exp(W x) diag(b):  every token's row sums to 1, every expert's column to T / E        (no gradient)
    training: S = the K largest of Q;   else S = the K largest of W x;    g_e = p_e for e in S, p = softmax or sigmoid

Q sees the whole batch, so it is for training alone, and only for the choice: outside, a token's own logits choose, as
in Megatron-LM, which no other token changes. Padding has no row. T tokens, E experts, K active.
"""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from molora_jax.core import routing
from molora_jax.routers.base import Router


def balanced(z, open_, iterations, tolerance=1e-4):
    """Q `[T, E]` of `z [T, E]`; rows of `open_ [T, E]` without any expert are 0."""
    open_ = jnp.broadcast_to(open_, z.shape)
    most = jnp.max(jnp.where(open_, z, routing.NEG_INF), axis=-1, keepdims=True)
    M = jnp.where(open_, jnp.exp(jnp.where(open_, z - most, 0.0)), 0.0)
    row = jnp.any(open_, axis=-1)
    column = jnp.any(open_, axis=0)
    share = jnp.sum(row) / jnp.maximum(jnp.sum(column), 1)
    over = lambda want, sums: jnp.where(sums > 0, want / jnp.where(sums > 0, sums, 1.0), 0.0)  # noqa: E731

    def step(state):
        b, _, n = state
        a = over(row.astype(jnp.float32), M @ b)
        new = over(jnp.where(column, share, 0.0), a @ M)
        return new, jnp.max(jnp.abs(jnp.log(jnp.where(column, new, 1.0) / jnp.where(column, b, 1.0)))), n + 1

    go = lambda state: (state[1] > tolerance) & (state[2] < iterations)  # noqa: E731
    b, _, _ = jax.lax.while_loop(go, step, (column.astype(jnp.float32), jnp.float32(jnp.inf), 0))
    a = over(row.astype(jnp.float32), M @ b)
    return a[:, None] * M * b


@dataclasses.dataclass(frozen=True)
class Sinkhorn(Router):
    """`iterations`: the most; it ends when no column's factor moves by 1e-4. 0 chooses by logits in training too."""

    k: int = 1
    values: Literal["softmax", "sigmoid"] = "softmax"
    iterations: int = 100

    LIMITS: ClassVar = {"k": (1, None), "iterations": (0, None)}

    def k_max(self, experts):
        return min(self.k, experts)

    def route(self, p, shared, x, ctx):
        z = routing.logits(p["W"], x)
        E, mask = z.shape[-1], routing.permitted(ctx.allowed)
        open_ = jnp.broadcast_to(mask, z.shape)
        score = jnp.where(open_, z, routing.NEG_INF)
        if self.iterations and ctx.train:
            seen = (open_ & ctx.valid[..., None]).reshape(-1, E)
            Q = balanced(jax.lax.stop_gradient(z).reshape(-1, E), seen, self.iterations).reshape(z.shape)
            score = jnp.where(open_, Q, routing.NEG_INF)
        selected = routing.top_k(score, self.k) & mask
        if self.values == "softmax":
            value = probs = routing.softmax(z, ctx.allowed)
        else:
            value = jnp.where(mask, jax.nn.sigmoid(z), 0.0)
            probs = routing.normalised(value)
        gates = jnp.where(selected, value, 0.0)
        return routing.finish(gates, selected, z, probs, ctx, k_max=self.k_max(E)), ctx.carry, {}
