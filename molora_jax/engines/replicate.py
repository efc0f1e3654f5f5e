"""Every device has every expert: nothing moves in the forward pass, gradients are summed over all devices.

    2 S E (N-1)/N numbers a layer and step (an all-reduce over all N devices), S the parameters of one expert

T tokens a device, E experts, N devices.
"""

from molora_jax.core.lowrank import frozen_linear
from molora_jax.placements import ffn, projection

MOVES = False  # whether tokens travel


def project(x, W, parts, on, rows, share=(0, 1)):
    """`x [T, D_in]`, `W [D_in, D_out]` -> `[T, D_out]`; see `base.py`."""
    return projection.project(W, x, parts, rows, share), None


def ranks(x, parts, on, rows):
    """`ffn.ranks` of every part."""
    return [ffn.ranks(x, part, rows) for part in parts]


def feed_forward(x, g, u, weights, parts, on, rows, activation, share=(0, 1), z=None):
    """`x [T, D]`, `g, u [T, F]` -> `mix [T, F]` for the frozen W_d, and `rest [T, D]` beside it; see `base.py`."""
    down = lambda h: frozen_linear(weights["down"], h)  # noqa: E731
    return *ffn.apply(x, g, u, parts, activation, down, rows, share, z), None


def refuses(factors, *, place, latent: bool, on) -> str | None:
    """Why this engine cannot serve an adapter, None where it can."""
    return None


def bytes_moved(load, on) -> tuple[float, float]:
    """`(shipped, useful)` bytes of one device, layer and step."""
    return (load.sums(on),) * 2
