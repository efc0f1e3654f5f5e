"""`rank_gated`: the all-expert low-rank product with the gates applied in rank space."""

import jax.numpy as jnp

from kernels_pallas.check import agree
from kernels_pallas.pick import no_kernel_because, pick
from kernels_pallas.platform import is_side_by_side, platform_of
from kernels_pallas.rank_gated import dense, reference, tpu

IMPLEMENTATIONS = {"reference": reference.rank_gated, "dense": dense.rank_gated}
KERNELS = {"tpu": tpu.rank_gated}
REFUSED = {"tiled": "every expert is computed for every token; the product by experts is grouped_lora"}


def no_kernel(x, B) -> str | None:
    """Why the kernel cannot serve these shapes here, None where it can."""
    (T, D_in), (E, R, D_out) = x.shape, B.shape
    return no_kernel_because(lambda: tpu.rows_that_fit(T, E * R, E, D_in, D_out, x.dtype.itemsize, True))


def choose(x, A, B, gates, *, platform: str | None = None) -> tuple[str, str]:
    """The implementation for these shapes, and why. Only shapes and x's dtype count."""
    (E, R, _), platform = B.shape, platform_of(platform)
    if platform == "tpu" and is_side_by_side():
        return "dense", "tpu: several runs under vmap, for which the kernel has no grid"
    if platform != "tpu":
        return "dense", f"{platform}: all experts in one product, a form that XLA does well"
    why = no_kernel(x, B)
    if why:
        return "dense", f"tpu: {why}"
    return "tpu", f"tpu: A and B ({E * R} columns) stay in VMEM and the rank activations never leave it"


def check(x, A, B, gates) -> dict[str, int]:
    """The sizes by axis. Raises ValueError where the shapes do not agree."""
    return agree("rank_gated", x=(x, "T D_in"), B=(B, "E R D_out"), A=(A, "1|E R D_in"), gates=(gates, "T E"))


def rank_gated(x, A, B, gates, *, implementation: str | None = None, platform: str | None = None):
    """`y_t = sum_e g_te B_e A_e x_t`, differentiable in every argument.

    Args:
      x: `[T, D_in]` float32 or bfloat16.
      A: `[E, R, D_in]`, or `[1, R, D_in]` shared by the experts.
      B: `[E, R, D_out]`, the scale folded in.
      gates: `[T, E]` float32; 0 means not selected.
      implementation: `reference`, `dense`, `tpu`, or None to choose.
      platform: what to choose for; by default that of the mesh in context, else the default backend.

    Returns:
      `[T, D_out]` in x's dtype; accumulated in float32.

    Raises:
      ValueError: shapes that do not agree; an implementation that the op does not have, or that cannot run here.

    >>> import jax.numpy as jnp, molora_jax as mj
    >>> x, A, B = jnp.ones((1, 4)), jnp.ones((3, 2, 4)), jnp.ones((3, 2, 5))
    >>> mj.rank_gated(x, A, B, jnp.array([[0.5, 0.0, 0.25]]))[0, 0].item()  # (0.5 + 0.25) * 2 * 4
    6.0
    """
    sizes = check(x, A, B, gates)
    name = choose(x, A, B, gates, platform=platform)[0] if implementation is None else implementation
    why_not = lambda: no_kernel(x, B)  # noqa: E731
    form = pick("rank_gated", IMPLEMENTATIONS, KERNELS, name, refused=REFUSED, platform=platform, no_kernel=why_not)
    if sizes["T"] == 0:
        return jnp.zeros((0, sizes["D_out"]), x.dtype)
    return form(x, A, B, gates)
