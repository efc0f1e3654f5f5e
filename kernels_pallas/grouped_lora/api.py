"""`grouped_lora`: the low-rank product of each token's own experts, and its two halves."""

from kernels_pallas.grouped_lora import reference, tiled
from kernels_pallas.platform import platform_of

IMPLEMENTATIONS = {"reference": reference.grouped_lora, "tiled": tiled.grouped_lora}
REFUSED = {
    "dense": "all experts for every token is the op rank_gated, which takes gates [T, E]",
    "tpu": "not written yet",
}


def choose(x, A, B, idx, *, platform: str | None = None) -> tuple[str, str]:
    """The implementation for these shapes, and why."""
    return "tiled", f"{platform_of(platform)}: loops over tiles of one expert, the only grouped form here so far"


def grouped_lora(x, A, B, idx, gates, *, implementation: str | None = None, platform: str | None = None):
    """`y_t = sum_k g_tk B[e_tk] A[e_tk] x_t`, differentiable in x, A, B and gates.

    Args:
      x: `[T, D_in]` float32 or bfloat16.
      A: `[E, R, D_in]`, or `[1, R, D_in]` shared by the experts.
      B: `[E, R, D_out]`, the scale folded in.
      idx: `[T, K]` int32, E at a slot that is not used.
      gates: `[T, K]` float32; those of unused slots are not read.
      implementation: `reference`, `tiled`, or None to choose.
      platform: what to choose for; by default that of the mesh in context, else the default backend.

    Returns:
      `[T, D_out]` in x's dtype; accumulated in float32. An expert without tokens gets gradients of exactly zero.

    Raises:
      ValueError: an implementation that the op does not have.
    """
    name = implementation or choose(x, A, B, idx, platform=platform)[0]
    if name not in IMPLEMENTATIONS:
        why = f" ({REFUSED[name]})" if name in REFUSED else ""
        raise ValueError(f"grouped_lora has no implementation {name!r}{why}; it has {', '.join(IMPLEMENTATIONS)}.")
    return IMPLEMENTATIONS[name](x, A, B, idx, gates)


def grouped_shrink(x, A, idx):
    """`z[t, k] = A[e_tk] x_t`: `x [T, D]`, `A [E, R, D]`, `idx [T, K]` -> `[T, K, R]` float32, 0 at unused slots."""
    return tiled.shrink(x, A, idx)


def grouped_expand(z, B, idx, gates, *, dtype):
    """`sum_k g_tk B[e_tk] z[t, k]`: `z [T, K, R]`, `B [E, R, D]`, `idx, gates [T, K]` -> `[T, D]` in dtype."""
    return tiled.expand(z, B, idx, gates, dtype=dtype)
