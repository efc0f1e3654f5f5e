"""`rank_gated`: the all-expert low-rank product with the gates applied in rank space."""

from kernels_pallas.rank_gated import dense, reference

IMPLEMENTATIONS = {"reference": reference.rank_gated, "dense": dense.rank_gated}


def choose(x, A, B, gates) -> tuple[str, str]:
    """The implementation for these shapes, and why."""
    return "dense", "all experts in one product: the only form so far"


def rank_gated(x, A, B, gates, *, implementation: str | None = None):
    """`y_t = sum_e g_te B_e A_e x_t`, differentiable in every argument.

    Args:
      x: `[T, D_in]` float32 or bfloat16.
      A: `[E, R, D_in]`, or `[1, R, D_in]` shared by the experts.
      B: `[E, R, D_out]`, the scale folded in.
      gates: `[T, E]` float32; 0 means not selected.
      implementation: `reference`, `dense`, or None to choose.

    Returns:
      `[T, D_out]` in x's dtype; accumulated in float32.

    Raises:
      ValueError: an implementation that the op does not have.
    """
    name = implementation or choose(x, A, B, gates)[0]
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"rank_gated has no implementation {name!r}; it has {', '.join(IMPLEMENTATIONS)}.")
    return IMPLEMENTATIONS[name](x, A, B, gates)
