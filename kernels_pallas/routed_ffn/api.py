"""`routed_ffn`: K experts' hidden states mixed between the shared projections of one frozen FFN."""

from kernels_pallas.routed_ffn import dense, reference

IMPLEMENTATIONS = {"reference": reference.routed_ffn, "dense": dense.routed_ffn}


def choose(g, B_g, idx) -> tuple[str, str]:
    """The implementation for these shapes, and why."""
    return "dense", "one slot at a time in pure XLA: the only form so far without [T, K, F] in memory"


def routed_ffn(
    g, u, z_g, z_u, B_g, B_u, A_d, idx, gates, base, *, activation="silu", mask=None, implementation: str | None = None
):
    """`h_k = act(g + B_g[e_k] z_g[k]) * (u + B_u[e_k] z_u[k])`, mixed before the down projection.

    The frozen down projection is linear, so `sum_k w_k W_d h_k = W_d (sum_k w_k h_k)`: the caller applies W_d once to
    `mix`. Only the rank-R down path needs each h_k.

    Args:
      g, u: `[T, F]` shared gate and up projections.
      z_g, z_u: `[T, K, R]` rank activations of the token's slots.
      B_g, B_u: `[E, R, F]`; A_d: `[E, R, F]` or `[1, R, F]`; the scale is folded into the B.
      idx: `[T, K]` int32, E at a slot that is not used.
      gates: `[T, K]` float32.
      base: `[T]` coefficient of the frozen FFN's own hidden state h_0.
      activation: `silu` or `gelu`.
      mask: `[T, F]` dropout mask (already divided by its keep rate) on the input of A_d, or None.

    Returns:
      `mix [T, F] = base h_0 + sum_k w_k h_k` and `z_d [T, K, R] = A_d[e_k] (mask * h_k)`, 0 at unused slots.

    Raises:
      ValueError: an implementation that the op does not have.
    """
    name = implementation or choose(g, B_g, idx)[0]
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"routed_ffn has no implementation {name!r}; it has {', '.join(IMPLEMENTATIONS)}.")
    return IMPLEMENTATIONS[name](
        g, u, z_g, z_u, B_g, B_u, A_d, idx, gates, base, activation=activation, mask=mask
    )
