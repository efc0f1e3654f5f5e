"""`grouped_lora`: the low-rank product of each token's own experts, and its two halves."""

import jax.numpy as jnp

from kernels_pallas.check import agree
from kernels_pallas.grouped_lora import reference, tiled, tpu
from kernels_pallas.pick import no_kernel_because, pick
from kernels_pallas.platform import is_side_by_side, platform_of
from kernels_pallas.tiles import plain

IMPLEMENTATIONS = {"reference": reference.grouped_lora, "tiled": tiled.grouped_lora}
KERNELS = {"tpu": tpu.grouped_lora}
REFUSED = {"dense": "all experts for every token is the op rank_gated, which takes gates [T, E]"}


def no_kernel(x, B, idx) -> str | None:
    """Why the kernel cannot serve these shapes here, None where it can."""
    need = idx.size, max(B.shape[1], 8), x.shape[1], B.shape[2], x.dtype.itemsize
    return no_kernel_because(lambda: tpu.rows_that_fit(*need))


def choose(x, A, B, idx, *, platform: str | None = None) -> tuple[str, str]:
    """The implementation for these shapes, and why. Only shapes and x's dtype count."""
    platform = platform_of(platform)
    if platform != "tpu":
        return "tiled", f"{platform}: loops over tiles of one expert, the one grouped form without a kernel"
    if is_side_by_side():
        return "tiled", "tpu: several runs under vmap, for which the kernel has no grid"
    why = no_kernel(x, B, idx)
    if why:
        return "tiled", f"tpu: {why}"
    return "tpu", "tpu: ragged groups without padding, rank activations in VMEM only"


def check(x, A, B, idx, gates) -> dict[str, int]:
    """The sizes by axis. Raises ValueError where the shapes do not agree."""
    return agree(
        "grouped_lora", x=(x, "T D_in"), B=(B, "E R D_out"), A=(A, "1|E R D_in"), idx=(idx, "T K"), gates=(gates, "T K")
    )


def grouped_lora(x, A, B, idx, gates, *, implementation: str | None = None, platform: str | None = None):
    """`y_t = sum_k g_tk B[e_tk] A[e_tk] x_t`, differentiable in x, A, B and gates.

    Args:
      x: `[T, D_in]` float32 or bfloat16.
      A: `[E, R, D_in]`, or `[1, R, D_in]` shared by the experts.
      B: `[E, R, D_out]`, the scale folded in. Both may be `tiles.InStack`.
      idx: `[T, K]` int32, E at a slot that is not used; a token names an expert at most once.
      gates: `[T, K]` float32; those of unused slots are not read.
      implementation: `reference`, `tiled`, `tpu`, or None to choose.
      platform: what to choose for; by default that of the mesh in context, else the default backend.

    Returns:
      `[T, D_out]` in x's dtype; accumulated in float32. An expert without tokens gets gradients of exactly zero.

    Raises:
      ValueError: shapes that do not agree; an implementation that the op does not have, or that cannot run here.

    >>> import jax.numpy as jnp, molora_jax as mj
    >>> x, A, B = jnp.ones((1, 4)), jnp.ones((3, 2, 4)), jnp.ones((3, 2, 5))
    >>> mj.grouped_lora(x, A, B, jnp.array([[0, 2]]), jnp.array([[0.5, 0.25]]))[0, 0].item()  # (0.5 + 0.25) * 2 * 4
    6.0
    """
    sizes = check(x, A, B, idx, gates)
    name = choose(x, A, B, idx, platform=platform)[0] if implementation is None else implementation
    why_not = lambda: no_kernel(x, B, idx)  # noqa: E731
    form = pick("grouped_lora", IMPLEMENTATIONS, KERNELS, name, refused=REFUSED, platform=platform, no_kernel=why_not)
    if sizes["T"] == 0:
        return jnp.zeros((0, sizes["D_out"]), x.dtype)
    if name != "tiled":
        A, B = plain(A), plain(B)
    return form(x, A, B, idx, gates)


def grouped_shrink(x, A, idx):
    """`z[t, k] = A[e_tk] x_t`: `x [T, D]`, `A [E, R, D]`, `idx [T, K]` -> `[T, K, R]` float32, 0 at unused slots.

    >>> import jax.numpy as jnp, molora_jax as mj
    >>> mj.grouped_shrink(jnp.ones((1, 4)), jnp.ones((3, 2, 4)), jnp.array([[1, 3]])).tolist()  # 3 experts: 3 is none
    [[[4.0, 4.0], [0.0, 0.0]]]
    """
    agree("grouped_shrink", x=(x, "T D"), A=(A, "E R D"), idx=(idx, "T K"))
    if len(x) == 0:
        return jnp.zeros((*idx.shape, A.shape[1]))
    return tiled.shrink(x, A, idx)


def grouped_expand(z, B, idx, gates, *, dtype):
    """`sum_k g_tk B[e_tk] z[t, k]`: `z [T, K, R]`, `B [E, R, D]`, `idx, gates [T, K]` -> `[T, D]` in dtype.

    >>> import jax.numpy as jnp, molora_jax as mj
    >>> z, B, gates = jnp.ones((1, 1, 2)), jnp.ones((3, 2, 2)), jnp.array([[0.5]])
    >>> mj.grouped_expand(z, B, jnp.array([[1]]), gates, dtype=jnp.float32).tolist()
    [[1.0, 1.0]]
    """
    agree("grouped_expand", z=(z, "T K R"), B=(B, "E R D"), idx=(idx, "T K"), gates=(gates, "T K"))
    if len(z) == 0:
        return jnp.zeros((0, B.shape[2]), dtype)
    return tiled.expand(z, B, idx, gates, dtype=dtype)
