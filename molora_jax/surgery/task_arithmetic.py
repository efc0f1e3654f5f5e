"""Task arithmetic (Ilharco et al. 2022, arXiv 2212.04089): the weighted sum of the runs' weight changes.

    B A = sum_j w_j s_j B_j A_j

    cat      the rows of all runs beside each other, B_j scaled: exact, of rank sum_j R_j
    svd      the best form of rank R of the same sum
    linear   A = sum_j sqrt(w_j s_j) A_j, B likewise, of the parents' own rank: it has cross terms B_i A_j

w_j = 1 by default; a negative one takes a task away (its sign goes to A). These are peft's forms of the same names.
"""

import dataclasses
from typing import ClassVar, Literal

import numpy as np

from molora_jax.core import factorise
from molora_jax.surgery import base as contract
from molora_jax.surgery.base import Result, Surgery, weights_of


@dataclasses.dataclass(frozen=True)
class TaskArithmetic(Surgery):
    """`weights`: "" for 1, one number for all, or a number a run by commas. `rank`, of `svd`: 0 is the parents' own."""

    form: Literal["cat", "svd", "linear"] = "cat"
    rank: int = 0
    weights: str = ""

    LIMITS: ClassVar[dict] = {"rank": (0, None)}

    def check(self, parents):
        weights_of(self.weights, len(parents), 1.0)
        contract.same_sites(parents, ranks=self.form == "linear")

    def apply(self, parents):
        w = weights_of(self.weights, len(parents), 1.0)
        ranks = contract.merged_ranks(parents, self.rank if self.form == "svd" else 0)
        if self.form == "cat":
            ranks = {rule: max(map(sum, every)) for rule, every in contract.ranks_of(parents).items()}
        config, leaves = contract.plain_config(parents, ranks), {}
        for at, pairs in contract.sites(parents):
            if self.form == "linear":
                s = np.array([parent.scale(at[0]) for parent in parents])
                root = np.sqrt(np.abs(w) * s)
                A = sum(r * A.astype(np.float64) for r, (A, _) in zip(root * np.sign(w), pairs, strict=True))
                B = sum(r * B.astype(np.float64) for r, (_, B) in zip(root / s, pairs, strict=True))
            else:
                A, B = contract.stacked(pairs, w)
                A, B = (A, B) if self.form == "cat" else factorise.truncated(A, B, ranks[at[0]])
            leaves |= contract.pair(at, *_padded(A, B, ranks[at[0]]))
        return Result(config, leaves)


def _padded(A, B, rank):
    """Zero rows where a site has fewer than the rule's others: they add nothing."""
    absent = rank - len(A)
    return (A, B) if not absent else tuple(np.pad(x, ((0, absent), (0, 0))) for x in (A, B))
