"""NOLA (Koohpayegani et al. 2023, arXiv 2310.02556): factors that are mixtures of frozen random matrices.

    A_e = A_off + (1/sqrt k) sum_{i<k} alpha_ei A_i      B_e = (1/sqrt l) sum_{j<l} beta_ej B_j      delta = s B_e A_e x

A_i [R, D_in], B_j [R, D_out] have entries U(-1, 1), A_off U(+-1/sqrt(D_in)), float32; alpha [k] and beta [l] train and
start at 0: k + l parameters a projection, whatever R and the widths. E experts share the bases and A_off of their
projection; each has an alpha and a beta of its own.

Bases are never stored: each projection saves an int32 seed, and its matrices are made from it inside the step, `chunk`
at a time, and once more in the backward pass. `check` holds the bits of the first entries, which are compared when a
run is opened. `share_basis`: one seed for all layers (the paper's GPT-2 code), else each has its own (its Llama code).

The code has A_off and 1/sqrt k, the paper's formula neither. `offset=False` leaves A_off out: alpha then starts at 1,
for with A = B = 0 no gradient would ever flow; `normalise=False` leaves the roots out: the rate then depends on k, l.
Weight decay would pull A towards A_off, so it stays 0.
"""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from molora_jax.adapters.base import Adapter
from molora_jax.core import random_bases
from molora_jax.core.types import Factors

OF_A, OF_B, OFFSET = range(3)  # streams of one seed
CHECKED = 4  # entries of the first matrix


@dataclasses.dataclass(frozen=True)
class Nola(Adapter):
    """`bases_A, bases_B`: k and l. `chunk`: random matrices in memory at a time."""

    init: Literal["kaiming"] = "kaiming"  # of A_off
    bases_A: int = 512
    bases_B: int = 512
    chunk: int = 32
    share_basis: bool = False
    offset: bool = True
    normalise: bool = True

    LIMITS: ClassVar = {"bases_A": (1, None), "bases_B": (1, None), "chunk": (1, None)}
    FROZEN: ClassVar[tuple[str, ...]] = ("seed", "check")

    def init_shared(self, key, sites):
        names = dict.fromkeys(site.name for site in sites) if self.share_basis else ()
        return {name: _seed(jax.random.fold_in(key, i)) for i, name in enumerate(names)}

    def init_leaves(self, key, site, layer, *, base=None, base_grad=None):
        """`alpha [E, k]`, `beta [E, l]`, and `seed [1]`, `check [1, 4]` int32 where layers do not share them."""
        alpha = jnp.full((site.experts, self.bases_A), 0.0 if self.offset else 1.0)
        own = {"alpha": alpha, "beta": jnp.zeros((site.experts, self.bases_B))}
        return own if self.share_basis else own | _seed(key)

    def factors(self, p, shared, ctx):
        site, seed = ctx.site, (shared[ctx.site.name] if self.share_basis else p)["seed"][0]
        A = self._mixture(p["alpha"], seed, OF_A, site.d_in)
        if self.offset:
            offset = random_bases.uniform(seed, jnp.arange(1), self.rank * site.d_in, stream=OFFSET)
            A = A + site.d_in**-0.5 * offset.reshape(1, self.rank, site.d_in)
        return Factors(A, self._mixture(p["beta"], seed, OF_B, site.d_out))

    def _mixture(self, coefficients, seed, stream, width):
        N = coefficients.shape[1]
        flat = random_bases.combination(coefficients, seed, self.rank * width, stream, min(self.chunk, N))
        return (N**-0.5 if self.normalise else 1.0) * flat.reshape(-1, self.rank, width)

    def same_bases(self, leaves):
        if "seed" not in leaves:
            return True
        pairs = zip(np.reshape(leaves["seed"], -1), np.reshape(leaves["check"], (-1, CHECKED)), strict=True)
        return all((np.asarray(_first(seed)) == check).all() for seed, check in pairs)


def _seed(key) -> dict:
    seed = jax.random.randint(key, (1,), 0, 2**31 - 1, jnp.int32)
    return {"seed": seed, "check": _first(seed[0])[None]}


def _first(seed):
    return jax.lax.bitcast_convert_type(random_bases.uniform(seed, jnp.arange(1), CHECKED)[0], jnp.int32)
