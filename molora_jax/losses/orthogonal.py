"""AdaLoRA's regulariser (Zhang et al. 2023, arXiv 2303.10512, eq. 4): singular vectors stay near orthonormal.

    l = mean over all A, B of triplets of ||A A^T - I||_F, ||B^T B - I||_F          (the norm, not its square, as peft)

One value a matrix: every layer, site and expert has two.
"""

import dataclasses

import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from molora_jax.core.tangent import einsum
from molora_jax.core.trees import triplets
from molora_jax.errors import InputError
from molora_jax.losses.base import OfLeaves


@dataclasses.dataclass(frozen=True)
class Orthogonal(OfLeaves):
    weight: float = 0.5

    def penalty(self, trainable, memory):
        flat = flatten_dict(trainable, sep="/")
        found = [flat[path] for A, B, _ in triplets(flat) for path in (A, B)]
        if not found:
            raise InputError(
                "losses.orthogonal", got="no A, B and lam that train", expected="a rule whose adapter is adalora"
            )
        total = sum(jnp.sum(distance(F)) for F in found)
        return total / sum(F.size // (F.shape[-1] * F.shape[-2]) for F in found)


def distance(F):
    """`||F F^T - I||_F`, `[...]` of `F [..., R, D]`; its slope is 0 where it is."""
    off = einsum("...rd,...qd->...rq", F, F) - jnp.eye(F.shape[-2])
    square = jnp.sum(off * off, axis=(-2, -1))
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
