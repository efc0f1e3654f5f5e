"""Adapters of several kinds in one rule (`rules.X.adapters`): their leaves side by side, each kind with its own maths.

At a projection every kind of `ADAPTERS` that the rule lists has one expert; two places of a block have kinds of their
own (MoA, arXiv 2506.05928; the placement `block` says where and how they act):

    prompt     P [1, N, D] ~ N(0, 1), gate [1, H] = 0
    parallel   inward [1, M, D], outward [1, M, D] uniform (Xavier) times 1e-4, their biases b [1, M], c [1, D] = 0

N prompt tokens, M the parallel adapter's width, D model width, H heads.
"""

import dataclasses

import jax
import jax.numpy as jnp

from molora_jax.adapters.base import Adapter
from molora_jax.config.fields import PROJECTIONS
from molora_jax.errors import InputError

GAIN = 1e-4  # on both matrices of the parallel adapter: its output starts near 1e-9, its gradients near 1e-4 of others'


@dataclasses.dataclass(frozen=True)
class Prompt:
    """`site.d_out` is the number of heads."""

    length: int

    def init_leaves(self, key, site):
        return {
            "P": jax.random.normal(key, (site.experts, self.length, site.d_in)),
            "gate": jnp.zeros((site.experts, site.d_out)),
        }


@dataclasses.dataclass(frozen=True)
class Parallel:
    width: int

    def init_leaves(self, key, site):
        bound = GAIN * (6 / (self.width + site.d_in)) ** 0.5
        shape = (site.experts, self.width, site.d_in)
        draw = lambda key: jax.random.uniform(key, shape, minval=-bound, maxval=bound)  # noqa: E731
        inward, outward = map(draw, jax.random.split(key))
        zeros = {"b": jnp.zeros(shape[:2]), "c": jnp.zeros((site.experts, site.d_in))}
        return {"inward": inward, "outward": outward} | zeros


@dataclasses.dataclass(frozen=True)
class Mixed(Adapter):
    """`kinds`: (name, member) in the rule's order, those at projections first; the fields are the first one's."""

    kinds: tuple = ()

    @property
    def at_projections(self) -> tuple[Adapter, ...]:
        return tuple(member for _, member in self.kinds if isinstance(member, Adapter))

    @property
    def FROZEN(self):
        return tuple(dict.fromkeys(name for kind in self.at_projections for name in kind.FROZEN))

    @property
    def PAIRED(self):
        return any(kind.PAIRED for kind in self.at_projections)

    def scale(self):
        return self.at_projections[0].scale()

    def check(self, where, sites):
        """Raises InputError for two kinds that would share a leaf, or one that does not fit."""
        own = _projections(sites)
        for i, kind in enumerate(self.at_projections):
            kind.check(where, own)
            for other in self.at_projections[:i]:
                both = _leaves(kind, own[0]) & _leaves(other, own[0])
                if both:
                    raise InputError(
                        f"{where}s", got=f"{type(other).__name__} and {type(kind).__name__}, both with leaves "
                        f"{', '.join(sorted(both))} at a projection", expected="kinds whose leaves have other names",
                        fix="Write two rules: their changes add up.",
                    )  # fmt: skip

    def init_leaves(self, key, site, layer, *, base=None, base_grad=None):
        if site.name not in PROJECTIONS:
            return dict(self.kinds)[site.name].init_leaves(key, site)
        out = {}
        for i, kind in enumerate(self.at_projections):  # the first one's are those of a rule of its own
            own = key if i == 0 else jax.random.fold_in(key, i)
            out |= kind.init_leaves(own, site, layer, base=base, base_grad=base_grad)
        return out

    def init_shared(self, key, sites):
        out = {}
        for i, kind in enumerate(self.at_projections):
            out |= kind.init_shared(key if i == 0 else jax.random.fold_in(key, i), _projections(sites))
        return out

    def factors(self, p, shared, ctx):
        """Those of the first kind: an engine's table is made of them, and one expert a kind travels nowhere."""
        return self.at_projections[0].factors(p, shared, ctx)

    def same_bases(self, leaves):
        return all(kind.same_bases(leaves) for kind in self.at_projections)

    def update_mask(self, updates, step, step_key):
        for kind in self.at_projections:
            updates = kind.update_mask(updates, step, step_key)
        return updates


def _projections(sites):
    return tuple(site for site in sites if site.name in PROJECTIONS)


def _leaves(kind: Adapter, site) -> set[str]:
    """Names of a kind's leaves at a projection."""
    W = jax.ShapeDtypeStruct((site.d_in, site.d_out), jnp.float32)
    make = lambda W: kind.init_leaves(jax.random.key(0), site, 0, base=W, base_grad=W)  # noqa: E731
    return set(jax.eval_shape(make, W))
