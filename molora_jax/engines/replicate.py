"""Every device has every expert: nothing moves in the forward pass, gradients are summed over all devices.

    2 S E (N-1)/N numbers a layer and step (an all-reduce over all N devices), S the parameters of one expert

T tokens a device, E experts, N devices.
"""

MOVES = False  # whether tokens travel
STORES = False  # whether experts are kept in shards


def fetch(leaf):
    """Every device has it."""
    return leaf


def bytes_moved(traffic, on) -> tuple[float, float]:
    """`(shipped, useful)` bytes of one device, layer and step."""
    return (traffic.whole(on) + traffic.sums(on),) * 2
