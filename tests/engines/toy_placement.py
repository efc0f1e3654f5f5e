"""A placement in one file: a frozen base that routes already, with a change of its own for each of its experts.

    y = sum_k w_k (W_e + s B_e A_e) x,   e = idx_k, w_k the base's own decision

No router of the rule; kernels `W [E, D, D]` and factors lie together, in shards under the engines that have them.
"""

import dataclasses
from typing import ClassVar

import flax.struct
import jax.numpy as jnp

from molora_jax.core import lowrank
from molora_jax.core.types import Array, Factors
from molora_jax.placements.base import Axes, Part, Placement


@flax.struct.dataclass
class ToyPart(Part):
    kernels: Array
    factors: Factors
    idx: Array
    gates: Array
    placement: Placement = flax.struct.field(pytree_node=False)
    routed: bool = flax.struct.field(pytree_node=False, default=True)

    experts = property(lambda self: self.placement.base_experts)
    decision = property(lambda self: (self.idx, self.gates))

    def axes(self, rank_space):
        tokens = Axes(("tokens", None))
        return self.replace(
            kernels=Axes(("frozen_expert", "width", "width")),
            factors=self.placement.axes(self.factors, "", rank_space), idx=tokens, gates=tokens,
        )  # fmt: skip

    def _mixed(self, x, idx, gates):
        hot = jnp.sum(jnp.where(idx[..., None] == jnp.arange(len(self.kernels)), gates[..., None], 0.0), axis=1)
        frozen = jnp.einsum("te,td,edo->to", hot, x, self.kernels)
        return frozen + lowrank.low_rank(x, self.factors, hot, None, (idx, gates))

    def here(self, arrays, out, at, early=None):
        return self._mixed(arrays["x"], self.idx, self.gates)

    def sends(self, arrays, at, rank_space):
        return arrays["x"]

    def there(self, arrays, rows, shard):
        return self._mixed(rows.x, rows.expert[:, None], rows.gates[:, None])

    def stay(self, arrays, out, back, lost):
        return back


@dataclasses.dataclass(frozen=True)
class ToyExperts(Placement):
    base_experts: int = 8
    k: int = 2

    NAME: ClassVar[str] = "toy_experts"
    NAMED: ClassVar[bool] = True
    SITES: ClassVar[tuple[str, ...]] = ("ffn",)
    OWNS: ClassVar[tuple[str, ...] | None] = ("ffn",)
    AXES: ClassVar[dict] = {"A": ("expert", "rank", "width"), "B": ("expert", "rank", "width")}

    def acts(self, rule):
        return ("experts",)

    def slots(self, rule, experts, config):
        return self.k

    def frozen(self, config, meeting):
        return self.base_experts * config.width**2

    def part(self, rule, site, p, shared, routing, context, x):
        idx, gates, kernels = routing
        factors = rule.adapter.factors(p["ffn"], shared, context(site)).replace(scale=rule.adapter.scale())
        return ToyPart(kernels, factors, idx, gates, self)
