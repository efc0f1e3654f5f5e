"""The one place where placements and engines meet: from global arrays under `jit` into `shard_map` and back.

Everything around is jit over global arrays; only what happens in here is local: the frozen product, every rule's change
of it, and the one sum over `tensor`, together in one `shard_map` a region (an all-gather of experts in a `shard_map` of
its own has an all-reduce of all their gradients as its transpose; inside, a reduce-scatter). On one device the same
functions are called as they are.

    tokens   over data, fsdp, expert; experts over `expert` where the engine splits them; the rest replicated
    tensor   q k v gate up: B, the biases and W's columns are split; o down: x, A and W's rows, and the outputs summed
             (of a state-space block in_proj dt_proj, and x_proj out_proj)

T tokens, D width, F FFN width, E experts, K slots.
"""

import contextlib
import functools

import chex
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from molora_jax.core.quant import finer, is_quantised
from molora_jax.core.types import Array
from molora_jax.engines.base import Engine
from molora_jax.placements.base import At, Axes, Beside, Region, Rows, of_kernel
from molora_jax.placements.ffn import Hidden
from molora_jax.placements.projection import Linear
from molora_jax.sharding import AXES, ROWS


def project(on: Engine, site: str, W: Array, bias: Array | None, x: Array, parts, rest: Array | None = None):
    """A frozen projection with every rule's change of it.

    Args:
      x: `[T, D_in]`; W: `[D_in, D_out]`; parts: of placements that act at projections.
      rest: `[T, D_out]` (or `[ways of tensor, T, D_out]`, partial sums) to add.

    Returns:
      `[T, D_out]`, and for each part `[1 | devices, 2]` slots sent and dropped, or None where nothing is counted.
    """
    D_in, D_out = W.shape
    chex.assert_shape(x, (None, D_in))
    if bias is not None:
        chex.assert_shape(bias, (D_out,))
    if rest is not None:
        chex.assert_shape(rest, (..., len(x), D_out))
    arrays = {"x": x, "W": W, "bias": bias, "rest": rest}
    return meet(on, Linear(site), {name: a for name, a in arrays.items() if a is not None}, parts)


def feed_forward(on: Engine, x: Array, g: Array, u: Array, weights: dict, parts, activation: str):
    """A routed FFN up to its frozen down projection.

    Args:
      x: `[T, D]`; g, u: `[T, F]`, the shared projections; weights: frozen kernels of gate, up and down.

    Returns:
      `mix [T, F]`, `rest` for `project`, and the counts of every part (see there).
    """
    (mix, rest), counts = meet(on, Hidden(activation), {"x": x, "g": g, "u": u, **weights}, parts)
    return mix, rest, counts


def beside(on: Engine, x: Array, part):
    """`x [T, D]` -> the part's change of the block's output `[T, D]`, and its counts (see `project`)."""
    y, (counts,) = meet(on, Beside(), {"x": x}, [part])
    return y, counts


def meet(on: Engine, region: Region, arrays: dict, parts):
    """Tokens and experts of a region. `arrays` by name (`region.axes()`), with `x [T, ...]`; parts of any placements.

    Returns:
      What the region gives (`region.outs()`), and the counts of every part.
    """
    num_tokens = len(arrays["x"])
    chex.assert_rank(arrays["x"], 2)
    if on.alone:
        at = At(jnp.arange(num_tokens), (0, 1))
        arrays, out = region.start(region.enter(arrays, parts, moved=False, split=False), parts, at)
        for part in parts:
            out = part.here(arrays, out, at)
        return region.end(arrays, region.close(arrays, out, len(parts))), [None] * len(parts)

    rows, ways = on.row_axes(num_tokens), on.ways("tensor")
    split = region.inner is not None and on.tensor(region.inner)
    parts = [_padded(_in_shards(part, part.axes(on.rank_space), on), on) for part in parts]
    axes = [part.axes(on.rank_space) for part in parts]
    away = [on.moves(part) for part in parts]
    specs = [jax.tree.map(lambda a, p=p: on.spec(a, rows, p), a) for a, p in zip(axes, parts, strict=True)]
    early = [None] * len(parts)
    if split and not any(away):
        early = _early(on, rows, arrays["x"], parts, axes, specs)
    arrays = region.enter(arrays, parts, moved=any(away), split=ways > 1)
    named, outs = region.axes(), region.outs()
    arrays = {n: _in_shards(a, of_kernel(a, named[n]), on) for n, a in arrays.items()}

    def local(arrays, parts, early):
        at = At(_rows(rows, len(arrays["x"])), (jax.lax.axis_index("tensor"), ways) if split else (0, 1))
        arrays = {n: a[0] if ways > 1 and "sum" in named[n].names else a for n, a in arrays.items()}
        parts = [on.fetch(part, a) for part, a in zip(parts, axes, strict=True)]
        arrays, out = region.start(arrays, [part for part, far in zip(parts, away, strict=True) if not far], at)
        counts = []
        for part, far, formed in zip(parts, away, early, strict=True):
            if far:
                out, count = _travel(on, part, arrays, out, at)
            else:
                out, count = part.here(arrays, out, at, formed), None
            counts.append(count)
        out = region.close(arrays, out, len(parts))
        if ways > 1:
            out = jax.tree.map(lambda a, y: _summed(on, a, y, split), outs, out)
        return region.end(arrays, out), counts

    spec = lambda a: on.spec(a, rows)  # noqa: E731
    enter = {n: jax.tree.map(spec, of_kernel(a, named[n])) for n, a in arrays.items()}
    run = jax.shard_map(
        local, mesh=on.mesh, in_specs=(enter, specs, P(rows)),
        out_specs=(jax.tree.map(spec, outs), P(rows)), check_vma=False,
        axis_names=set(ROWS if region.inner is None and ways > 1 else AXES),
    )  # fmt: skip
    with _in_context(on.mesh):
        return run(arrays, parts, early)


def _in_context(mesh):
    """A caller's own `jax.set_mesh` may have other axes over the same devices; `shard_map` takes only the set one."""
    now = jax.sharding.get_abstract_mesh()
    return contextlib.nullcontext() if now.empty else jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def _in_shards(tree, axes, on):
    """Quantised kernels of a tree in blocks that end where the shards of D_in over `tensor` do."""

    def fit(W, a):
        split = is_quantised(W) and on.spec(a.arrays["codes"], ())[-2] == "tensor"
        return finer(W, on.ways("tensor")) if split else W

    return jax.tree.map(fit, tree, axes, is_leaf=is_quantised)


def _travel(on, part, arrays, out, at):
    """`out` with the change by experts of other devices, to which the tokens go; and the slots sent and dropped."""
    idx, gates = part.decision
    x = part.sends(arrays, at, on.rank_space)
    with jax.named_scope("dispatch"):
        trip = on.trip(idx, part.experts, at.rows if part.placement.IDS > 1 else None)
        received = trip.slots(gates)
        row = trip.slots(x) if x.ndim == 3 else trip.tokens(x)
    back = part.there(arrays, Rows(row, trip.expert, received, trip.ids, x.ndim == 3), at.shard)
    with jax.named_scope("combine"):
        back = trip.home(back)
    return part.stay(arrays, out, back, trip.lost(gates)), trip.counts


def _early(on, rows, x, parts, axes, specs):
    """What parts form before the region, the axis `tensor` left to the compiler (`Part.early`)."""

    def local(x, parts, ids):
        return [on.fetch(part, a).early(x, At(ids, (0, 1))) for part, a in zip(parts, axes, strict=True)]

    without = lambda s: P(*(None if a == "tensor" else a for a in s))  # noqa: E731
    run = jax.shard_map(
        local, mesh=on.mesh, in_specs=(P(rows, None), jax.tree.map(without, specs), P(rows)), out_specs=P(rows),
        axis_names=set(ROWS), check_vma=False,
    )  # fmt: skip
    with _in_context(on.mesh):
        return run(x, parts, jnp.arange(len(x)))


def _summed(on, axes: Axes, y, split: bool):
    if "sum" in axes.names:
        return y[None]
    return sum_over_tensor(y, on.ways("tensor")) if split and not on.tensor(axes) else y


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


def _padded(part, on):
    """A part whose experts the axis `expert` does not divide, with masked experts (zeros) at its end."""
    masked = on.padded(part.experts) - part.experts
    if not masked or not on.split(part.experts, part.routed):
        return part
    grow = lambda leaf: jnp.pad(leaf, [(0, masked)] + [(0, 0)] * (leaf.ndim - 1))  # noqa: E731
    axes = part.axes(on.rank_space)
    split = lambda a: a.names[:1] in (("expert",), ("frozen_expert",))  # noqa: E731
    return jax.tree.map(lambda leaf, a: grow(leaf) if split(a) else leaf, part, axes)
