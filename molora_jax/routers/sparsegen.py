"""Sparsegen: a projection on the simplex whose sparsity a small MLP predicts for each token (LD-MoLE, 2509.25684).

    u = W x,   p = argmin over the simplex of |p - u|^2 - lambda |p|^2
    p_i = max(u_i - tau, 0) / (1 - lambda),   tau = (U_k* - 1 + lambda) / k*,   U_k: sum of the k largest
    k* = the largest k with 1 - lambda + k u_(k) > U_k        (strict: with >= experts of weight 0 would be active)
    lambda(x) = log sigmoid(MLP(x)) + 1 - eps,   MLP: D -> H, ReLU, H -> 1

lambda = 0 is sparsemax, lambda near 1 one expert, lambda to -inf all E alike. The gates sum to 1 and at least one is
positive, so no token is left without an expert. Piecewise smooth: with S the active experts, k of them,
dp_i/du_j = (delta_ij - 1/k) / (1 - lambda), dp_i/dlambda = (p_i - 1/k) / (1 - lambda) inside S, 0 outside.

One MLP for each input width of the rule's routers, shared by all layers and projections of that width.
B batch, S sequence, D width, E experts, H hidden width.
"""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from molora_jax.core import lowrank, routing
from molora_jax.routers.base import Router


def sparsegen(u, lam):
    """`u [..., E]`, `lam [...]` below 1 -> p `[..., E]`, of the dtype of u (float32 or more: sums of sorted values).

    >>> import jax.numpy as jnp
    >>> sparsegen(jnp.array([1.0, 0.5, 0.0, -0.5]), jnp.array(0.0)).tolist()
    [0.75, 0.25, 0.0, 0.0]
    """
    left = 1 - lam[..., None]
    u = u - jax.lax.stop_gradient(jnp.max(u, axis=-1, keepdims=True))  # p is the same; what is active is small
    still = jax.lax.stop_gradient(u)
    ranked = -jnp.sort(-still, axis=-1)
    total, k = jnp.cumsum(ranked, axis=-1), jnp.arange(1, u.shape[-1] + 1)
    inside = jax.lax.stop_gradient(left) + k * ranked > total
    most = jnp.maximum(jnp.sum(inside, axis=-1, keepdims=True), 1)
    last = jnp.take_along_axis(ranked, most - 1, axis=-1)
    active = still >= last
    # inside the support all is linear, so that its derivatives are those of the formula
    count = jnp.sum(active, axis=-1, keepdims=True)
    mean = jnp.sum(jnp.where(active, u, 0.0), axis=-1, keepdims=True) / count
    return jnp.where(active, jnp.maximum((u - mean) / left + 1 / count, 0.0), 0.0)


@dataclasses.dataclass(frozen=True)
class Sparsegen(Router):
    """`hidden` H; `eps` bounds lambda by 1 - eps; `bias` is the start of all biases of the MLP.

    With the code's bias of -2.5 the hidden layer starts dead at inputs of size 1 and lambda is the constant -1.59 until
    the last bias has moved; with 0 lambda tells tokens apart from the start. `learned=False`: lambda is `fixed`, and
    there is no MLP. `input_dropout`: router and MLP read the adapter's dropped input, as in the code.
    """

    init: Literal["normal", "kaiming"] = "kaiming"
    hidden: int = 256
    eps: float = 1e-2
    bias: float = -2.5
    learned: bool = True
    fixed: float = 0.0
    input_dropout: bool = True

    LIMITS: ClassVar = {"hidden": (1, None), "eps": (0, 1, "()"), "fixed": (None, 1, "()")}

    def k_max(self, experts):
        return experts

    def init_shared(self, key, sites):
        if not self.learned:
            return {}
        return {"lambda": {str(width): self._mlp(jax.random.fold_in(key, width), width) for width in
                           sorted({site.d_in for site in sites})}}  # fmt: skip

    def _mlp(self, key, width):
        keys, H = jax.random.split(key), self.hidden
        draw = lambda key, *shape: jax.random.uniform(  # noqa: E731
            key, shape, minval=-(shape[-1] ** -0.5), maxval=shape[-1] ** -0.5
        )
        return {"W1": draw(keys[0], H, width), "b1": jnp.full(H, self.bias),
                "W2": draw(keys[1], 1, H), "b2": jnp.full(1, self.bias)}  # fmt: skip

    def sparsity(self, shared, x):
        """lambda `[B, S]` of `x [B, S, D]`, float32."""
        if not self.learned:
            return jnp.full(x.shape[:-1], self.fixed, jnp.float32)
        p = shared["lambda"][str(x.shape[-1])]
        hidden = jax.nn.relu(routing.logits(p["W1"], x, p["b1"]))
        return jax.nn.log_sigmoid(routing.logits(p["W2"], hidden, p["b2"])[..., 0]) + 1 - self.eps

    def route(self, p, shared, x, ctx):
        if self.input_dropout:
            flat = x.reshape(-1, x.shape[-1])
            x = lowrank.dropped(flat, lowrank.dropout(ctx.keyed(), ctx.dropout), jnp.arange(len(flat))).reshape(x.shape)
        z, lam = routing.logits(p["W"], x), self.sparsity(shared, x)
        gates = sparsegen(jnp.where(routing.permitted(ctx.allowed), z, routing.NEG_INF), lam)
        probs = jnp.where(routing.permitted(ctx.allowed), gates, 0.0)
        decision = routing.finish(
            gates, gates > 0, z, probs, ctx, k_max=self.k_max(z.shape[-1]), sums_to_one=True
        ).replace(sparsity=lam)
        return decision, ctx.carry, {}
