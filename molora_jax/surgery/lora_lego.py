"""LoRA-LEGO (Zhao et al. 2024, arXiv 2409.16167): LoRAs as sets of rank-1 units, clustered and put together again.

    units    (a, b): row i of A_j, column i of s_j B_j; the pool of a site has N = sum_j R_j of them
    centres  mu_c = mean of the units of cluster c (k-means on [a; b], k clusters)
    norms    mu_c <- mu_c * mean_i ||m_i|| / ||mu_c||, i over the cluster: a mean of different vectors is too short
    output   B A = sqrt(R / k) sum_c b_c a_c^T,   R the mean rank of the sources (1 at k = R)

A unit has a free scale, (t a, b / t) is the same change: `units="balanced"` moves it until ||a|| = ||b||, which the
distances are then not ruled by a alone; "raw" leaves it as it was trained, with s_j in b. A unit whose a or b is 0
changes nothing and does not enter the pool. (-a, -b) is the same change too, and a mean of both is 0: with `signs`
(ours) a unit enters a cluster with the sign that is nearer. The mean is of one update's size, not of n: that is meant.
Runs of one seed start from one A, and units may cluster by that start: give LoRAs that are to be merged other seeds.
R rank, k merged rank, N units, D_in and D_out widths.
"""

import dataclasses
from typing import ClassVar, Literal

import numpy as np

from molora_jax.core.clustering import kmeans
from molora_jax.errors import InputError
from molora_jax.surgery import base as contract
from molora_jax.surgery.base import Result, Surgery

TINY = 1e-12  # of a cluster's mean norm: what is left of units that cancel has no direction


@dataclasses.dataclass(frozen=True)
class LoraLego(Surgery):
    """`rank` is k, 0 for the sources' largest.

    `cluster`: distances between whole units, or between [a/||a||; b/||b||] (a public implementation's). `norm`: which
    norm the centres get back; "off" leaves them. `output`: the factor sqrt(R / k). `starts`: of k-means, by `seed`.
    """

    rank: int = 0
    units: Literal["balanced", "raw"] = "balanced"
    cluster: Literal["whole", "directions"] = "whole"
    norm: Literal["l2", "linf", "off"] = "l2"
    output: bool = True
    signs: bool = False
    starts: int = 8
    seed: int = 0

    LIMITS: ClassVar[dict] = {"rank": (0, None), "starts": (1, 1000), "seed": (0, 2147483647)}

    def check(self, parents):
        contract.same_sites(parents, ranks=False)
        pool = min(sum(ranks) for every in contract.ranks_of(parents).values() for ranks in every)
        if self.rank > pool:
            raise InputError(
                "surgery.rank", got=str(self.rank), expected=f"at most {pool}, the ranks of the inputs together",
                fix="Lower it.",
            )  # fmt: skip

    def apply(self, parents):
        ranks = contract.merged_ranks(parents, self.rank)
        config, leaves = contract.plain_config(parents, ranks), {}
        for at, pairs in contract.sites(parents):
            leaves |= contract.pair(at, *self.merged(pairs, ranks[at[0]]))
        return Result(config, leaves)

    def merged(self, pairs: list[tuple[np.ndarray, np.ndarray]], k: int) -> tuple[np.ndarray, np.ndarray]:
        """`(A [k, D_in], B [k, D_out])` of LoRAs `(A_j [R_j, D_in], s_j B_j [R_j, D_out])` on one site, scale 1."""
        R = np.mean([len(A) for A, _ in pairs])
        A, B = (np.concatenate([pair[i] for pair in pairs]).astype(np.float64) for i in (0, 1))
        a, b = (np.linalg.norm(x, axis=1) for x in (A, B))
        there = (a > 0) & (b > 0)
        A, B, a, b = A[there], B[there], a[there, None], b[there, None]
        if self.units == "balanced":
            A, B = A * np.sqrt(b / a), B * np.sqrt(a / b)
            a = b = np.sqrt(a * b)
        pool = np.concatenate([A, B], axis=1)
        seen = pool if self.cluster == "whole" else np.concatenate([A / a, B / b], axis=1)
        labels, sign = kmeans(seen, k, seed=self.seed, starts=self.starts, signs=self.signs)
        pool = sign[:, None] * pool
        centres = np.zeros((k, pool.shape[1]))
        for c in set(labels.tolist()):
            centres[c] = self.centre(pool[labels == c])
        factor = np.sqrt(R / k) if self.output else 1.0
        return centres[:, : A.shape[1]], factor * centres[:, A.shape[1] :]

    def centre(self, members: np.ndarray) -> np.ndarray:
        """Of one cluster's units `[M, D_in + D_out]`."""
        mean, order = members.mean(axis=0), {"l2": 2, "linf": np.inf}.get(self.norm)
        if order is None or len(members) == 1:
            return mean
        wanted, own = np.linalg.norm(members, order, axis=1).mean(), np.linalg.norm(mean, order)
        return mean * (wanted / own) if own > TINY * wanted else np.zeros_like(mean)
