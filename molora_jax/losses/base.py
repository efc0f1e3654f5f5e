"""The contract of a routing loss. A loss is a frozen dataclass of its config.

`stats(routing, ctx) -> sums` runs inside the layer scan on one router's decision; the sums leave it as
`[layers, ...]`. `value(stats) -> scalar` runs once at the end on `{rule: {segment: {scope: sums}}}`.
"""

import dataclasses

import jax
import jax.numpy as jnp

from molora_jax.core.types import Array, Context, Routing


@dataclasses.dataclass(frozen=True)
class Loss:
    weight: float = 1e-2

    def stats(self, routing: Routing, ctx: Context) -> dict[str, Array]:
        raise NotImplementedError

    def join(self, stacked: dict) -> dict:
        """The sums of several micro-steps, `[micro-steps, layers, ...]`, as those of the whole batch."""
        return jax.tree.map(lambda x: jnp.sum(x, axis=0), stacked)

    def value(self, stats: dict) -> Array:
        raise NotImplementedError


def leaves(stats: dict):
    """Every router's sums: `(rule, segment, scope, sums)`, sums leading with the segment's layers."""
    for rule, segments in stats.items():
        for segment, scopes in segments.items():
            for scope, sums in scopes.items():
                yield rule, segment, scope, sums
