"""Experts stay in P shards and are gathered where they are used: FSDP by expert. Tokens stay at home.

    3 S E (P-1)/P numbers a layer and step inside a checkpointed stack: two all-gathers (the forward pass and its
    recomputation), one reduce-scatter of gradients; then an all-reduce of the own shard over the other axes. Experts
    that tokens meet again in the layer (a chain's passes) are gathered once, their gradients summed each time

The gather is part of the differentiated program, so its transpose, the reduce-scatter, needs no code.
A layer whose E the axis does not divide is stored whole and runs as `replicate`.

S parameters of one expert, E experts, P devices on the axis `expert`.
"""

import jax

from molora_jax.engines import replicate

MOVES = False  # whether tokens travel
STORES = True  # whether experts are kept in shards


@jax.named_scope("gather")
def fetch(leaf):
    """`[E/P, ...]` -> `[E, ...]`."""
    return jax.lax.all_gather(leaf, "expert", axis=0, tiled=True)


def bytes_moved(traffic, on) -> tuple[float, float]:
    """`(shipped, useful)` bytes of one device, layer and step: all-gathers, the reduce-scatter, sums of the shard."""
    if not on.stored(traffic.E):
        return replicate.bytes_moved(traffic, on)
    own = sum(size for size, each, _ in traffic.leaves if each) * (on.peers - 1) / on.peers
    # XLA joins equal all-gathers of a layer; the sums it does not
    fetched = 0 if traffic.again else traffic.passes * own
    return (fetched + own + traffic.whole(on) + traffic.sharded(on) + traffic.sums(on, per_expert=False),) * 2
