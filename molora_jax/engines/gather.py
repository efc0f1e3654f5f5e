"""Experts stay in P shares and are gathered where they are used: FSDP by expert. Tokens stay at home.

    3 S E (P-1)/P numbers a layer and step inside a checkpointed stack: two all-gathers (the forward pass and its
    recomputation), one reduce-scatter of gradients; then an all-reduce of the own share over the other axes

The gather is part of the differentiated program, so its transpose, the reduce-scatter, needs no code.
A layer whose E the axis does not divide is stored whole and runs as `replicate`.

S parameters of one expert, E experts, P devices on the axis `expert`.
"""

import jax

from molora_jax.core.types import Factors
from molora_jax.engines import replicate

MOVES = False  # whether tokens travel

refuses = replicate.refuses


def gathered(factors: Factors, shared_A: bool) -> Factors:
    """`[E/P, ...]` -> `[E, ...]`; an A that the experts share is whole already."""
    whole = jax.tree.map(lambda leaf: jax.lax.all_gather(leaf, "expert", axis=0, tiled=True), factors)
    return whole.replace(A=factors.A) if shared_A else whole


def project(x, W, parts, on, rows, share=(0, 1)):
    """As `replicate.project`, once the experts are here."""

    def fetched(part):
        return part.replace(factors=gathered(part.factors, part.shared_A)) if on.stored(part.experts) else part

    with jax.named_scope("gather"):
        parts = [fetched(part) for part in parts]
    return replicate.project(x, W, parts, on, rows, share)


def _fetched(part, on, sites=("gate", "up", "down")):
    if not on.stored(part.experts):
        return part
    with jax.named_scope("gather"):
        return part.replace(factors=part.factors | {s: gathered(part.factors[s], part.shared_A) for s in sites})


def ranks(x, parts, on, rows):
    """As `replicate.ranks`, once the experts are here; what it does not use is not gathered."""
    return replicate.ranks(x, [_fetched(part, on, ("gate", "up")) for part in parts], on, rows)


def feed_forward(x, g, u, weights, parts, on, rows, activation, share=(0, 1), z=None):
    """As `replicate.feed_forward`, once the experts are here."""
    return replicate.feed_forward(x, g, u, weights, [_fetched(p, on) for p in parts], on, rows, activation, share, z)


def bytes_moved(load, on) -> tuple[float, float]:
    """`(shipped, useful)` bytes of one device, layer and step: all-gathers, the reduce-scatter, sums of the share."""
    if not on.stored(load.E):
        return replicate.bytes_moved(load, on)
    own = sum(size for size, each, _ in load.leaves if each) * (on.peers - 1) / on.peers
    return ((load.passes + 1) * own + load.shares(on) + load.sums(on, per_expert=False),) * 2
