"""MoS, mixture of shards (Wang et al. 2024, arXiv 2410.00938): factors assembled from a pool that all layers share.

    A(i)[j] = concat_{m < n} P_A[I_A(i)[j n + m]],   B(i)[j] = concat_{m < n} P_B[I_B(i)[j n + m]],   j < r
    delta_i(x) = (alpha / r) B(i) A(i) x

One pair of trained pools a projection type, P_A [e N n, D_in / n] and P_B [e N n, D_out / n]; the tables I_A, I_B
[r n] of instance i are drawn once, frozen and saved. An instance is a layer (with experts: one expert of one layer),
N of them in the rule. r active rank (`rank`), e parameter budget (`budget`: the pools are as large as LoRA of rank e),
p private rank (`private`), n shards a vector (`shards`).

Rows of a pool: (e - p) N n public ones, then p n private ones an instance. A table takes (r - p) n public rows
without repetition and all its private rows. I_A and I_B draw the public part apart (`dissociate`; False ties them).
p = e = r with n = 1 is LoRA. It is look-up in a static table, no router: nothing depends on the input.

The scale has r, not e; the bound of the init is that of the whole vector, D_in ** -0.5, not of a shard. The paper's
random scaling is inert in its code (v * 1/v) and left out. Rows that no table names get no gradient, so weight decay
is the only thing that would move them: keep it 0. The paper's code saves the expansion alone; here the pools are saved
and `to_lora` expands.
"""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from molora_jax.adapters.base import Adapter
from molora_jax.core.types import Factors
from molora_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Mos(Adapter):
    init: Literal["kaiming"] = "kaiming"  # of the pools: other inits start from one layer's weight
    budget: int = 4
    private: int = 1
    shards: int = 2
    dissociate: bool = True

    FROZEN: ClassVar[tuple[str, ...]] = ("I_A", "I_B")

    def check(self, where, sites):
        e, p, n, r = self.budget, self.private, self.shards, self.rank
        N = sum(sites[0].counts)

        def need(name, true, expected, fix):
            if not true:
                raise InputError(f"{where}.{name}", got=str(getattr(self, name)), expected=expected, fix=fix)

        need("budget", 1 <= e <= r, f"1 to rank = {r}", "The active rank is at least the budget.")
        need("private", 0 <= p <= e, f"0 to budget = {e}", "Private rows are part of the budget.")
        need("shards", n >= 1, "at least 1", "1 leaves vectors whole.")
        for site in sites:
            expected = f"a divisor of both widths of {site.name}, {site.d_in} and {site.d_out}"
            need("shards", site.d_in % n == site.d_out % n == 0, expected, "Choose a smaller power of two.")
        expected = f"at most private + (budget - private) * {N} = {p + (e - p) * N}: a table takes no row twice"
        need("rank", r - p <= (e - p) * N, expected, "Lower rank, or raise budget - private.")

    def init_shared(self, key, sites):
        pools = {}
        for site in sites:
            if site.name not in pools:
                rows, bound = self.budget * sum(site.counts) * self.shards, site.d_in**-0.5
                site_key = jax.random.fold_in(key, len(pools))  # a rule's sites keep the decoder's order
                shape = (rows, site.d_in // self.shards)
                pools[site.name] = {
                    "P_A": jax.random.uniform(site_key, shape, minval=-bound, maxval=bound),
                    "P_B": jnp.zeros((rows, site.d_out // self.shards)),
                }
        return pools

    def init_leaves(self, key, site, layer, *, base=None, base_grad=None):
        """`I_A, I_B [E, r n]` int32."""
        e, p, n = self.budget, self.private, self.shards
        public = (e - p) * sum(site.counts) * n
        before = jnp.array(np.cumsum((0, *site.counts[:-1])))[layer]  # instances in the layers below
        tables = {}
        for tag, name in enumerate(self.FROZEN):
            draw = jax.random.fold_in(key, tag if self.dissociate else 0)
            rows = []
            for expert in range(site.experts):
                order = jax.random.permutation(jax.random.fold_in(draw, expert), public)
                own = public + (before + expert) * p * n + jnp.arange(p * n)
                rows.append(jnp.concatenate([order[: (self.rank - p) * n], own]))
            tables[name] = jnp.stack(rows).astype(jnp.int32)
        return tables

    def factors(self, p, shared, ctx):
        pool, E = shared[ctx.site.name], len(p["I_A"])
        A, B = (pool[rows][p[table]].reshape(E, self.rank, -1) for rows, table in (("P_A", "I_A"), ("P_B", "I_B")))
        return Factors(A, B)


def to_lora(adapter: Mos, tables: dict, pool: dict) -> dict:
    """A site's layers as plain LoRA of rank r and the same alpha: `A [L, E, r, D_in]`, `B [L, E, r, D_out]`."""
    take = lambda rows, table: rows[table].reshape(*table.shape[:2], adapter.rank, -1)  # noqa: E731
    return {"A": take(pool["P_A"], tables["I_A"]), "B": take(pool["P_B"], tables["I_B"])}
