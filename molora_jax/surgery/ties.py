"""TIES merging (Yadav et al. 2023, arXiv 2306.01708): trim, elect a sign, average those that agree.

    t_j: the change of run j with all but its `density` share of largest entries set to 0
    g = sign(sum_j t_j)  (0 counts as +);   merged = sum_j [sign(t_j) = g] w_j t_j / #{j: sign(t_j) = g},   or 0

    product   of the weight changes s_j B_j A_j, entry by entry; the merged change in its best form of rank R (SVD)
    factors   of A and of B on their own, with sqrt(s_j w_j) in the place of w_j

Trimming is by site and run. w_j = 1 is the paper's scale lambda = 1. These are peft's `ties_svd` and `ties`.
"""

import dataclasses
from typing import ClassVar, Literal

import numpy as np

from molora_jax.core import factorise
from molora_jax.surgery import base as contract
from molora_jax.surgery.base import Result, Surgery, weights_of


@dataclasses.dataclass(frozen=True)
class Ties(Surgery):
    """`weights`: "" for 1, one number for all, or a number a run. `rank`, of `product`: 0 is the parents' own."""

    of: Literal["product", "factors"] = "product"
    density: float = 0.2
    rank: int = 0
    weights: str = ""

    PARENTS: ClassVar[tuple] = (2, None)
    LIMITS: ClassVar[dict] = {"rank": (0, None), "density": (0.001, 1.0)}

    def check(self, parents):
        weights_of(self.weights, len(parents), 1.0)
        contract.same_sites(parents, ranks=self.of == "factors")

    def apply(self, parents):
        w = weights_of(self.weights, len(parents), 1.0)
        ranks = contract.merged_ranks(parents, 0 if self.of == "factors" else self.rank)
        config, leaves = contract.plain_config(parents, ranks), {}
        for at, pairs in contract.sites(parents):
            if self.of == "product":
                merged = ties([factorise.update(A, B) for A, B in pairs], w, self.density)
                leaves |= contract.pair(at, *factorise.factors_of(merged, ranks[at[0]]))
            else:
                s = [parent.scale(at[0]) for parent in parents]
                root = np.sqrt(np.abs(w) * s)
                A = ties([A for A, _ in pairs], root * np.sign(w), self.density)
                B = ties([B / sj for sj, (_, B) in zip(s, pairs, strict=True)], root, self.density)
                leaves |= contract.pair(at, A, B)
        return Result(config, leaves)


def ties(changes: list[np.ndarray], weights, density: float) -> np.ndarray:
    """The merged one of n arrays of one shape, float64."""
    t = np.stack([trim(np.asarray(change, np.float64), density) for change in changes])
    agrees = np.sign(t) == np.where(t.sum(axis=0) >= 0, 1, -1)
    w = np.reshape(weights, (-1, *[1] * (t.ndim - 1)))
    return np.sum(t * w * agrees, axis=0) / np.maximum(agrees.sum(axis=0), 1)


def trim(change: np.ndarray, density: float) -> np.ndarray:
    """The largest `int(density * size)` entries by size, at least one."""
    keep = max(1, int(density * change.size))
    order = np.argpartition(-np.abs(change).ravel(), keep - 1)[:keep]
    out = np.zeros(change.size)
    out[order] = change.ravel()[order]
    return out.reshape(change.shape)
