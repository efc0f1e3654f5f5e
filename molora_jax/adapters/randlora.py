"""RandLoRA (Albert et al. 2025, arXiv 2502.00987): a full-rank change as a sum of random products with two diagonals.

    delta_e = s sum_{j < N} B_j diag(lambda_ej) A diag(gamma_ej)        N = ceil(d / R),  d = min(D_in, D_out)

of shape D x d, transposed where D_in > D_out: what trains, lambda [E, N, R] and gamma [E, N, d], is always on the
smaller side D_in or D_out. A SMALLER R trains more: N (d + R) parameters. lambda starts at 0, gamma at 1/d.

A [R, d], B [N, R, D] are float32, random, one pair for all layers and experts of the rule: of its largest d, N and D,
from which a site takes the first rows and columns. They follow from `seed`, are saved with the run and never train.
Each is divided by its standard deviation. `basis`: `uniform`; `sparse`, entries -c, 0, c of which 2/3 are 0;
`very_sparse`, all but 1/sqrt(d) are (peft's value; the paper has 1/sqrt(D)).

s = alpha / R (peft, whose alpha is 20 R, and the paper's vision code); `normalise` divides by sqrt N too (its language
code). peft pairs the columns of B and the rows of A in another order, `order="peft"`; `from_peft` reads its leaves.

Never W-sized: `A_hat = concat_j lambda_j A gamma_j [E, N R, d]` and `B_hat [N R, D]` are the factors of a product whose
inner width N R is about d. So nothing is gained from staying in rank space: a routed feed-forward block, a chain and a
rank-space exchange, which exist for R far below D, are refused.
"""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from molora_jax.adapters.base import Adapter
from molora_jax.core import random_bases
from molora_jax.core.types import Array, Factors, Site


@dataclasses.dataclass(frozen=True)
class RandLora(Adapter):
    rank: int = 32
    alpha: float = 640.0
    init: Literal["kaiming"] = "kaiming"  # of the bases, up to their scale
    basis: Literal["uniform", "sparse", "very_sparse"] = "uniform"
    order: Literal["pairs", "peft"] = "pairs"
    normalise: bool = False
    seed: int = 0

    LIMITS: ClassVar = {"seed": (0, None)}
    FROZEN: ClassVar[tuple[str, ...]] = ("basis_A", "basis_B")
    RANK_BOUND: ClassVar[bool] = False
    DENSE: ClassVar[bool] = True

    def bases(self, site: Site) -> int:
        """N."""
        return -(-min(site.d_in, site.d_out) // self.rank)

    def init_shared(self, key, sites):
        d, D = (max(side(site.d_in, site.d_out) for site in sites) for side in (min, max))
        N, R = max(map(self.bases, sites)), self.rank
        A, B = (self._drawn(stream, rows, width, d) for stream, (rows, width) in enumerate(((R, d), (N * R, D))))
        return {"basis_A": A, "basis_B": B.reshape(N, R, D)}

    def _drawn(self, stream, rows, columns, d):
        x = random_bases.uniform(self.seed, jnp.arange(rows), columns, stream=stream)
        if self.basis != "uniform":
            fraction = 1 / 3 if self.basis == "sparse" else d**-0.5  # of entries that are not 0
            x = jnp.where(jnp.abs(x) > 1 - fraction, jnp.sign(x), 0.0)
        return x / jnp.std(x)

    def init_leaves(self, key, site, layer, *, base=None, base_grad=None):
        E, N, d = site.experts, self.bases(site), min(site.d_in, site.d_out)
        return {"lambda": jnp.zeros((E, N, self.rank)), "gamma": jnp.full((E, N, d), 1 / d)}

    def factors(self, p, shared, ctx):
        E, N, d = p["gamma"].shape
        site, inner = ctx.site, N * self.rank
        large = shared["basis_B"][:N, :, : max(site.d_in, site.d_out)].reshape(inner, -1)
        small = scaled(shared["basis_A"][:, :d], p["lambda"], p["gamma"])
        if self.order == "peft":
            small = jnp.swapaxes(small, 1, 2)
        small = (N**-0.5 if self.normalise else 1.0) * small.reshape(E, inner, d)
        if site.d_in <= site.d_out:
            return Factors(small, jnp.broadcast_to(large, (E, *large.shape)))
        return Factors(large[None], small)


@jax.custom_vjp
def scaled(A: Array, lambda_: Array, gamma: Array) -> Array:
    """`lambda_j A gamma_j`, `[E, N, R, d]`, of `A [R, d]`; for its gradient the three are kept, no copy of A for a j.

    A is frozen: its own cotangent is 0.
    """
    return lambda_[..., None] * A * gamma[:, :, None, :]


def _backward(kept, g):
    A, lambda_, gamma = kept
    of_lambda = jnp.einsum("enrd,rd,end->enr", g, A, gamma)
    return jnp.zeros_like(A), of_lambda, jnp.einsum("enrd,rd,enr->end", g, A, lambda_)


scaled.defvjp(lambda *args: (scaled(*args), args), _backward)


def from_peft(adapter: RandLora, sites, A, B, lambdas: dict, gammas: dict) -> tuple[dict, dict]:
    """`(shared, leaves by site)` of an adapter with `order="peft"`, of one expert in one layer.

    Args:
      sites: all sites of the rule. A, B: peft's `randlora_A [R, 1, *]`, `randlora_B [*, N, R]`.
      lambdas, gammas: by name of a site, `[R, N]` and `[N, d]`.
    """
    shapes = jax.eval_shape(lambda: adapter.init_shared(jax.random.key(0), tuple(sites)))
    (_, d), (N, _, D) = shapes["basis_A"].shape, shapes["basis_B"].shape
    shared = {"basis_A": A[:, 0, :d], "basis_B": np.transpose(B[:D, :N], (1, 2, 0))}
    return shared, {name: {"lambda": lambdas[name].T[None], "gamma": gammas[name][None]} for name in lambdas}
