"""`routed_ffn`: K experts' hidden states mixed between the shared projections of one frozen FFN."""

import jax.numpy as jnp

from kernels_pallas.check import agree
from kernels_pallas.pick import no_kernel_because, pick
from kernels_pallas.platform import is_side_by_side, is_split, platform_of
from kernels_pallas.routed_ffn import dense, reference, tiled, tpu
from kernels_pallas.routed_ffn.activations import PAIRS
from kernels_pallas.tiles import plain

IMPLEMENTATIONS = {"reference": reference.routed_ffn, "dense": dense.routed_ffn, "tiled": tiled.routed_ffn}
KERNELS = {"tpu": tpu.routed_ffn}

CPU_DENSE_COLUMNS = 32  # E * R up to which the masked product is as fast as the tiles (docs/performance.md)


def no_kernel(g, B_g, idx) -> str | None:
    """Why the kernel cannot serve these shapes here, None where it can."""
    (T, F), (E, R, _), K = g.shape, B_g.shape, idx.shape[1]
    return no_kernel_because(lambda: tpu.tiles_that_fit(T, F, E * R, K * R, g.dtype.itemsize, True))


def choose(g, B_g, idx, *, platform: str | None = None) -> tuple[str, str]:
    """The implementation for these shapes, and why. `g [T, F]`, `B_g [E, R, F]`, `idx [T, K]`: only shapes are read."""
    E, R, _ = B_g.shape
    K, platform = idx.shape[1], platform_of(platform)
    if platform == "tpu" and is_side_by_side():
        return "dense", "tpu: several runs under vmap, for which the kernel has no grid"
    if platform == "tpu":
        why = no_kernel(g, B_g, idx)
        return ("dense", f"tpu: {why}") if why else ("tpu", "tpu: one pass over g and u, every h_k in VMEM only")
    if platform != "cpu":  # 4 to 70 times as fast as tiles of 32 rows, 3.5 to 7 times as tiles of 512 (performance.md)
        return "dense", f"{platform}: no kernel of its own yet, and a loop over tiles leaves the device idle (measured)"
    if is_split():
        return (
            "dense",
            "the compiler spreads the rows over a mesh: tiles would gather them (shard_map keeps them local)",
        )
    if E == 1:
        return "dense", "cpu: one expert: nothing to sort"
    if E * R <= CPU_DENSE_COLUMNS:
        return "dense", f"cpu: E*R = {E * R} columns, at most {CPU_DENSE_COLUMNS}: cheaper than sorting"
    return "tiled", f"cpu: E*R = {E * R} columns, more than {CPU_DENSE_COLUMNS}: cost grows with K = {K}, not with E"


def check(g, u, z_g, z_u, B_g, B_u, A_d, idx, gates, base_gate, *, activation, mask) -> dict[str, int]:
    """The sizes by axis. Raises ValueError where the shapes do not agree, or for an unknown activation."""
    if activation not in PAIRS:
        raise ValueError(f"routed_ffn: activation {activation!r} is not known, expected one of {', '.join(PAIRS)}.")
    wide = {"g": (g, "T F"), "u": (u, "T F"), "mask": (mask, "T F")}
    slots = {"idx": (idx, "T K"), "gates": (gates, "T K"), "z_g": (z_g, "T K R"), "z_u": (z_u, "T K R")}
    factors = {"B_g": (B_g, "E R F"), "B_u": (B_u, "E R F"), "A_d": (A_d, "1|E R F")}
    return agree("routed_ffn", **wide, **slots, **factors, base_gate=(base_gate, "T"))


def routed_ffn(
    g,
    u,
    z_g,
    z_u,
    B_g,
    B_u,
    A_d,
    idx,
    gates,
    base_gate,
    *,
    activation="silu",
    mask=None,
    implementation: str | None = None,
    platform: str | None = None,
):
    """`h_k = act(g + B_g[e_k] z_g[k]) * (u + B_u[e_k] z_u[k])`, mixed before the down projection.

    The frozen down projection is linear, so `sum_k w_k W_d h_k = W_d (sum_k w_k h_k)`: the caller applies W_d once to
    `mix`. Only the rank-R down path needs each h_k.

    Args:
      g, u: `[T, F]` shared gate and up projections.
      z_g, z_u: `[T, K, R]` rank activations of the token's slots.
      B_g, B_u: `[E, R, F]`; A_d: `[E, R, F]` or `[1, R, F]`; the scale is folded into the B. Each may be a
        `tiles.InStack`.
      idx: `[T, K]` int32, E at a slot that is not used; a token names an expert at most once.
      gates: `[T, K]` float32.
      base_gate: `[T]` coefficient of the frozen FFN's own hidden state h_0; bool where it is 0 or 1 and constant: it
        has no gradient then, and `tiled` forms h_0 in blocks of rows of which one is True.
      activation: `silu`, `gelu` (exact), `gelu_tanh` or `relu`.
      mask: `[T, F]` dropout mask (already divided by its keep rate) on the input of A_d, or None.
      implementation: `reference`, `dense`, `tiled`, `tpu`, or None to choose.
      platform: what to choose for; by default that of the mesh in context, else the default backend.

    Returns:
      `mix [T, F] = base_gate h_0 + sum_k w_k h_k` and `z_d [T, K, R] = A_d[e_k] (mask * h_k)`, 0 at unused slots.

    Raises:
      ValueError: shapes that do not agree, an unknown activation; an implementation that the op does not have, or that
        cannot run here.

    >>> import jax.numpy as jnp, molora_jax as mj
    >>> g, z, B, A = jnp.ones((1, 4)), jnp.ones((1, 1, 2)), jnp.full((3, 2, 4), 0.5), jnp.ones((3, 2, 4))
    >>> idx, gates = jnp.array([[1]]), jnp.array([[0.5]])
    >>> mix, z_d = mj.routed_ffn(g, g, z, z, B, B, A, idx, gates, jnp.zeros(1), activation="relu")
    >>> mix.tolist(), z_d.tolist()  # h = (1 + 1) (1 + 1)
    ([[2.0, 2.0, 2.0, 2.0]], [[[16.0, 16.0]]])
    """
    sizes = check(g, u, z_g, z_u, B_g, B_u, A_d, idx, gates, base_gate, activation=activation, mask=mask)
    name = choose(g, B_g, idx, platform=platform)[0] if implementation is None else implementation
    why_not = lambda: no_kernel(g, B_g, idx)  # noqa: E731
    form = pick("routed_ffn", IMPLEMENTATIONS, KERNELS, name, refused={}, platform=platform, no_kernel=why_not)
    if sizes["T"] == 0:
        return jnp.zeros_like(g), jnp.zeros(z_g.shape, g.dtype)
    if name != "tiled":
        B_g, B_u, A_d = plain(B_g), plain(B_u), plain(A_d)
    return form(g, u, z_g, z_u, B_g, B_u, A_d, idx, gates, base_gate, activation=activation, mask=mask)
