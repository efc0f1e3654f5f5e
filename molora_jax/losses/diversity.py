"""Experts' weight changes apart: the mean squared cosine between two experts of a site.

    l = mean over sites, layers and pairs e < f of  <D_e, D_f>^2 / (|D_e|^2 |D_f|^2),   D_e = B_e A_e

0 where changes are orthogonal, 1 where they are multiples of each other. It needs no D: <D_e, D_f> is the trace of
(A_e A_f^T)(B_f^T B_e). At B = 0 it is 0, and so is its slope; one A for all experts is read as such. Surveys name it
orthogonality or diversity of experts (OMoE and others use the experts' outputs instead, which no engine here forms).
"""

import dataclasses

import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from molora_jax.core.tangent import einsum
from molora_jax.errors import InputError
from molora_jax.losses.base import OfLeaves


@dataclasses.dataclass(frozen=True)
class Diversity(OfLeaves):
    weight: float = 1e-2

    def penalty(self, trainable, memory):
        flat = flatten_dict(trainable, sep="/")
        heads = [path.removesuffix("/B") for path in flat if path.endswith("/B") and "/router/" not in path]
        found = [(flat[f"{head}/A"], flat[f"{head}/B"]) for head in heads if f"{head}/A" in flat]
        found = [(A, B) for A, B in found if B.ndim == 4 and B.shape[1] > 1]
        if not found:
            raise InputError(
                "losses.diversity", got="no sites with trained A and B of several experts",
                expected="a rule with experts whose adapter trains both, such as lora", fix="Remove the loss.",
            )  # fmt: skip
        values = jnp.concatenate([squared_cosines(A, B).reshape(-1) for A, B in found])
        return jnp.mean(values)


def squared_cosines(A, B):
    """`[L, E (E - 1) / 2]` of `A [L, 1|E, R, D_in]`, `B [L, E, R, D_out]`."""
    E = B.shape[1]
    A = jnp.broadcast_to(A, (*B.shape[:3], A.shape[-1]))
    dots = jnp.sum(einsum("lerd,lfqd->lefrq", A, A) * einsum("lerd,lfqd->lefrq", B, B), axis=(-2, -1))
    square = jnp.diagonal(dots, axis1=-2, axis2=-1)
    whole = square[:, :, None] * square[:, None, :]
    cos2 = jnp.where(whole > 0, dots**2 / jnp.where(whole > 0, whole, 1.0), 0.0)
    e, f = jnp.triu_indices(E, 1)
    return cos2[:, e, f]
