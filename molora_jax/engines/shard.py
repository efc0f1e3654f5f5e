"""From global arrays under `jit` into `shard_map` and back: which share of what a device sees.

Everything around is jit over global arrays; only what an engine does is local. On one device the same local functions
are called as they are.

    tokens   over data, fsdp, expert; experts over `expert` where the engine splits them; the rest replicated
    tensor   q k v gate up: B, the biases and W's columns are split; o down: x, A and W's rows, and the outputs summed

T tokens, D width, F FFN width, E experts, K slots.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from molora_jax.core.lowrank import frozen_linear
from molora_jax.core.types import Array, Factors
from molora_jax.engines import all_to_all, gather, ragged_all_to_all, replicate
from molora_jax.engines.base import ROW_SITES, Engine
from molora_jax.placements import ffn
from molora_jax.sharding import ROWS

ENGINES = {
    "replicate": replicate,
    "gather": gather,
    "all_to_all": all_to_all,
    "ragged_all_to_all": ragged_all_to_all,
}


def project(on: Engine, site: str, W: Array, bias: Array | None, x: Array, parts, rest: Array | None = None):
    """A frozen projection with every rule's change of it.

    Args:
      x: `[T, D_in]`; W: `[D_in, D_out]`; parts: of `placements.projection`.
      rest: `[T, D_out]` (or `[ways of tensor, T, D_out]`, partial sums) to add.

    Returns:
      `[T, D_out]`, and for each part `[1 | devices, 2]` slots sent and dropped, or None where nothing is counted.
    """
    if on.alone:
        y, _ = replicate.project(x, W, parts, on, jnp.arange(len(x)))
        y = y if rest is None else y + rest
        return y if bias is None else y + bias.astype(y.dtype), [None] * len(parts)
    axes, row, ways = on.row_axes(len(x)), site in ROW_SITES, on.ways("tensor")
    into, out = ("tensor", None) if row else (None, "tensor")

    def local(x, W, bias, parts, rest):
        y, counts = ENGINES[on.name].project(x, W, parts, on, _rows(axes, len(x)), _share(on, row))
        if rest is not None:
            y = y + (rest if ways == 1 else rest[0])
        if row and ways > 1:
            y = sum_over_tensor(y, ways)
        return y if bias is None else y + bias.astype(y.dtype), counts or [None] * len(parts)

    specs = (
        P(axes, into), P(into, out), P(out), [_projection_specs(p, on, site, axes) for p in parts], _rest(axes, ways),
    )  # fmt: skip
    run = jax.shard_map(local, mesh=on.mesh, in_specs=specs, out_specs=(P(axes, out), P(axes)), check_vma=False)
    return run(x, W, bias, [_padded(p, on) for p in parts], rest)


def feed_forward(on: Engine, x: Array, g: Array, u: Array, weights: dict, parts, activation: str):
    """A routed FFN up to its frozen down projection.

    Args:
      x: `[T, D]`; g, u: `[T, F]`, the shared projections; weights: frozen kernels of gate, up and down.

    Returns:
      `mix [T, F]`, `rest` for `project`, and the counts of every part (see there).
    """
    if on.alone:
        mix, rest, _ = replicate.feed_forward(x, g, u, weights, parts, on, jnp.arange(len(x)), activation)
        return mix, rest, [None] * len(parts)
    axes, ways = on.row_axes(len(x)), on.ways("tensor")
    moved = any(on.moves_tokens and on.split(p.experts, p.routed) for p in parts)
    z = _ranks(on, axes, x, parts) if ways > 1 and not moved and all(map(ffn.is_plain, parts)) else None
    used = ("gate", "up", "down") if moved else ("down",) if any(p.per_expert for p in parts) else ()
    if moved and ways > 1:
        # x itself has to enter, with a cotangent of width D to be summed over `tensor`, as that of the base's gate and
        # up is. So these (no rule changes them here, see `auto.refusal`) are made inside: one sum serves all of them.
        g = u = None

    def local(x, g, u, weights, parts, z):
        rows, share = _rows(axes, len(x)), _share(on, True)
        if g is None:
            g, u = (frozen_linear(weights[s], x) for s in ("gate", "up"))
        mix, rest, counts = ENGINES[on.name].feed_forward(x, g, u, weights, parts, on, rows, activation, share, z)
        return mix, rest if ways == 1 else rest[None], counts or [None] * len(parts)

    specs = (
        P(axes, None), P(axes, "tensor"), P(axes, "tensor"),
        {s: P("tensor", None) if s in ROW_SITES else P(None, "tensor") for s in used},
        [_ffn_specs(p, on, axes) for p in parts], P(axes),
    )  # fmt: skip
    outs = (P(axes, "tensor"), _rest(axes, ways), P(axes))
    run = jax.shard_map(local, mesh=on.mesh, in_specs=specs, out_specs=outs, check_vma=False)
    return run(x, g, u, {s: weights[s] for s in used}, [_padded(p, on) for p in parts], z)


def _ranks(on, axes, x, parts):
    """Gate's and up's rank activations, the axis `tensor` left to the compiler.

    Inside the other `shard_map` x would be an input that is equal on all devices of `tensor`, its cotangent a sum over
    them of width D: the base model has none there. So x stays outside and only rank-wide arrays are summed.
    """
    local = lambda x, parts, rows: ENGINES[on.name].ranks(x, parts, on, rows)  # noqa: E731
    specs = [_without_tensor(_ffn_specs(p, on, axes)) for p in parts]
    run = jax.shard_map(
        local, mesh=on.mesh, in_specs=(P(axes, None), specs, P(axes)), out_specs=P(axes), axis_names=set(ROWS),
        check_vma=False,
    )  # fmt: skip
    return run(x, parts, jnp.arange(len(x)))


def _without_tensor(specs):
    return jax.tree.map(lambda s: P(*(None if a == "tensor" else a for a in s)), specs)


# check_vma=False, because a pallas_call is not allowed otherwise; then the cotangent of an output that is equal on all
# devices of an axis arrives divided by their number, and a psum would sum it again. It needs neither.
@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def sum_over_tensor(y: Array, ways: int) -> Array:
    """Partial sums `[T, D]` of the devices on `tensor` -> their sum. The backward pass moves nothing."""
    return jax.lax.psum(y, "tensor")


sum_over_tensor.defvjp(lambda y, ways: (sum_over_tensor(y, ways), None), lambda ways, _, dy: (dy * ways,))


def _rows(axes, num_tokens):
    """The local tokens' places in the global batch."""
    first = jax.lax.axis_index(axes) * num_tokens if axes else 0
    return first + jnp.arange(num_tokens)


def _share(on, split):
    ways = on.ways("tensor")
    return (jax.lax.axis_index("tensor"), ways) if split and ways > 1 else (0, 1)


def _rest(axes, ways):
    return P(axes, None) if ways == 1 else P("tensor", axes, None)


def _factor_specs(factors: Factors, site: str, on: Engine, split: bool, shared_A: bool, whole_A: bool) -> Factors:
    into, out = ("tensor", None) if site in ROW_SITES else (None, "tensor")
    e = "expert" if split else None
    specs = dict(
        A=P(None if shared_A or whole_A else e, None, into), B=P(e, None, out), mid=P(e), out=P(e, out), inp=P(e, into)
    )
    return factors.replace(**{name: None if getattr(factors, name) is None else spec for name, spec in specs.items()})


def _projection_specs(part, on, site, axes):
    split = on.split(part.experts, part.routed)
    return part.replace(
        factors=_factor_specs(part.factors, site, on, split, part.shared_A, split and on.rank_space),
        gates=P(axes, None), slots=None if part.slots is None else (P(axes, None), P(axes, None)),
        dropout=jax.tree.map(lambda _: P(), part.dropout),
    )  # fmt: skip


def _ffn_specs(part, on, axes):
    split = on.split(part.experts, part.routed)
    return part.replace(
        factors={s: _factor_specs(f, s, on, split, part.shared_A, False) for s, f in part.factors.items()},
        idx=P(axes, None), gates=P(axes, None), base=P(axes), dropout=jax.tree.map(lambda _: P(), part.dropout),
    )  # fmt: skip


def _padded(part, on):
    """A part whose experts the axis `expert` does not divide, with masked experts (zeros) at its end."""
    more = on.padded(part.experts) - part.experts
    if not more or not on.split(part.experts, part.routed):
        return part

    def pad(factors, keep_A):
        grow = lambda leaf: jnp.pad(leaf, [(0, more)] + [(0, 0)] * (leaf.ndim - 1))  # noqa: E731
        padded = jax.tree.map(grow, factors)
        return padded.replace(A=factors.A) if keep_A else padded

    if isinstance(part.factors, dict):
        return part.replace(factors={site: pad(f, part.shared_A) for site, f in part.factors.items()})
    return part.replace(factors=pad(part.factors, part.shared_A or on.rank_space))
