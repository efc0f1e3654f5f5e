"""`moe_ffn`: the feed-forward block of a frozen base that has experts of its own, with a low-rank change of each."""

import jax.numpy as jnp

from kernels_pallas.check import agree
from kernels_pallas.moe_ffn import ragged, reference, tiled
from kernels_pallas.moe_ffn.gates import NAMES
from kernels_pallas.pick import pick
from kernels_pallas.platform import is_side_by_side, platform_of
from kernels_pallas.quantised import dense
from kernels_pallas.tiles import plain

IMPLEMENTATIONS = {"reference": reference.moe_ffn, "ragged": ragged.moe_ffn, "tiled": tiled.moe_ffn}


def choose(*, platform: str | None = None) -> tuple[str, str]:
    """The implementation, and why: only the platform counts."""
    platform = platform_of(platform)
    if platform != "tpu":
        return "tiled", f"{platform}: jax.lax.ragged_dot would multiply every slot with every expert"
    if is_side_by_side():
        return "tiled", "tpu: several runs under vmap, each with groups of its own"
    return "ragged", "tpu: grouped products are kernels of the compiler's own"


def check(x, gate, up, down, low, idx, gates, *, activation, mask, bias=None) -> dict[str, int]:
    """The sizes by axis. Raises ValueError where the shapes do not agree, or for an unknown activation."""
    if activation not in NAMES:
        raise ValueError(f"moe_ffn: activation {activation!r} is not known, expected one of {', '.join(NAMES)}.")
    kernels = {"gate": (gate, "E D F"), "up": (up, "E D F"), "down": (down, "E F D")}
    z_g, z_u, B_g, B_u, A_d = low or (None,) * 5
    ranks = {"z_g": (z_g, "T K R"), "z_u": (z_u, "T K R")}
    factors = {"B_g": (B_g, "1|E R F"), "B_u": (B_u, "1|E R F"), "A_d": (A_d, "1|E R F")}
    slots = {"idx": (idx, "T K"), "gates": (gates, "T K")}
    b_g, b_u, b_d = bias or (None,) * 3
    biases = {"gate_bias": (b_g, "E F"), "up_bias": (b_u, "E F"), "down_bias": (b_d, "E D")}
    return agree("moe_ffn", x=(x, "T D"), **kernels, **slots, **ranks, **factors, **biases, mask=(mask, "T F"))


def moe_ffn(
    x, gate, up, down, low, idx, gates, *, activation="silu", mask=None, bias=None,
    implementation: str | None = None, platform: str | None = None,
):  # fmt: skip
    """`y = sum_k w_k W_d[e_k] h_k`, `h_k = act(W_g[e_k] x + B_g[e_k] z_g[k]) * (W_u[e_k] x + B_u[e_k] z_u[k])`.

    Args:
      x: `[T, D]`.
      gate, up: `[E, D, F]`; down: `[E, F, D]`: frozen kernels, without a gradient. Each may be a `tiles.InStack`
        or a `quantised.Quantised`, or both.
      low: None, or `(z_g, z_u, B_g, B_u, A_d)`: `[T, K, R]` rank activations of the token's slots (scale folded in),
        `B_g, B_u, A_d [1|E, R, F]`, 1 where the experts share it; each may be a `tiles.InStack`.
      idx: `[T, K]` int32, E at a slot that is not used; a token names an expert at most once.
      gates: `[T, K]` float32, with a gradient.
      activation: `silu`, `gelu` (exact), `gelu_tanh`, `relu`, or `clamped`, which bends the second factor too
        (`gates.py`).
      mask: `[T, F]` dropout mask (already divided by its keep rate) on the input of A_d, or None.
      bias: None, or `(b_g, b_u [E, F], b_d [E, D])`, added to the products with the kernels; frozen, each may be a
        `tiles.InStack`.
      implementation: `reference`, `ragged`, `tiled`, or None to choose.

    Returns:
      `y [T, D]` and `z_d [T, K, R] = A_d[e_k] (mask * h_k)`, 0 at unused slots; None without `low`.

    Raises:
      ValueError: shapes that do not agree, an unknown activation or implementation.

    >>> import jax.numpy as jnp, molora_jax as mj
    >>> x, W, W_down = jnp.ones((1, 2)), jnp.ones((3, 2, 4)), jnp.ones((3, 4, 2))
    >>> mj.moe_ffn(x, W, W, W_down, None, jnp.array([[1]]), jnp.array([[0.5]]), activation="relu")[0].tolist()
    [[8.0, 8.0]]
    """
    sizes = check(x, gate, up, down, low, idx, gates, activation=activation, mask=mask, bias=bias)
    name = choose(platform=platform)[0] if implementation is None else implementation
    form = pick("moe_ffn", IMPLEMENTATIONS, {}, name, refused={}, platform=platform, no_kernel=lambda: None)
    if sizes["T"] == 0:
        return jnp.zeros_like(x), None if low is None else jnp.zeros(low[0].shape, x.dtype)
    if name != "tiled":
        gate, up, down = (plain_of(W) for W in (gate, up, down))
        low = None if low is None else (*low[:2], *map(plain, low[2:]))
        bias = None if bias is None else tuple(map(plain_of, bias))
    return form(x, gate, up, down, low, idx, gates, activation=activation, mask=mask, bias=bias)


def plain_of(W):
    """`[E, ...]` of a frozen kernel or bias: a copy, where it lies in the stack of all layers or is quantised."""
    return dense(W.stack[W.layer] if hasattr(W, "stack") else W)
