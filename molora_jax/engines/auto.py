"""Which engine? The one that sends the fewest bytes, of those that can serve the rules; as a table, with the reason.

One formula an engine (`bytes_moved` in its file) for the buffers that it really ships in a training step, gradients
included; beside it the bytes that an ideal exchange would need. Tokens of one micro-step on one device.

T tokens a device, K slots, E experts, R rank, D width, F FFN width, N devices, P devices on the axis `expert`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from molora_jax import placements
from molora_jax.adapters.base import Adapter
from molora_jax.core import rules as rules_lib
from molora_jax.core.quant import BLOCK, BLOCK8
from molora_jax.core.types import Context
from molora_jax.engines.base import ENGINES, Engine, Traffic
from molora_jax.errors import InputError
from molora_jax.placements.base import Axes
from molora_jax.placements.base_experts import BaseExperts
from molora_jax.text import table as columns

STATE_BYTES = 16  # of one adapter parameter in float32: itself, its gradient, two moments


@dataclasses.dataclass(frozen=True)
class Row:
    """One engine's bytes a step and device; `refused` says why it cannot run here ("" where it can)."""

    name: str
    shipped: float
    useful: float
    refused: str


def factor_shapes(model, rule, name: str, segment):
    """`Factors` of shapes of one projection in one layer."""
    return _factor_shapes(rule.adapter, placements.of(rule), rules_lib.site(model.config, name, segment, rule))


@functools.cache  # of every site of every layout of layers, under every engine
def _factor_shapes(adapter, placement, at):
    W = jax.ShapeDtypeStruct((at.d_in, at.d_out), jnp.float32)

    def make(key, W):
        layers = jax.tree.map(lambda leaf: leaf[None], adapter.init_leaves(key, at, 0, base=W, base_grad=W))
        leaves = jax.tree.map(lambda leaf: leaf[0], placement.kept(at.name, layers))
        shared = adapter.init_shared(key, (at,))
        zeros = jnp.zeros((1, 1), jnp.int32)
        ctx = Context(zeros > 0, zeros, zeros, zeros, zeros, base=W, site=at, key=key, step_key=key, train=True)
        return adapter.factors(leaves, shared, ctx)

    return jax.eval_shape(make, jax.random.key(0), W)


def routed(model):
    """`(rule, segment, E, site)` of every meeting of tokens and experts in a layer of every segment."""
    for r, rule in enumerate(model.rules):
        for segment in model.segments:
            placement = placements.of(rule)
            experts = placement.experts(model.config, segment.counts[r]) if segment.counts[r] else 0
            if experts > 1 and placement.slots(rule, experts, model.config):
                for name in placement.meetings(rule):
                    yield rule, segment, experts, name


def kernel_bytes(itemsize: int, quant: str) -> float:
    """Of a number of the base's kernels; what is there once for an output channel or a kernel is left out."""
    return {"int8": 1 + 4 / BLOCK8, "nf4": 0.5 + 1 / BLOCK}.get(quant, itemsize)


def traffic(
    model, rule, segment, experts: int, name: str, *, on: Engine, tokens: int, itemsize: int, quant: str = "none"
) -> Traffic:
    """The traffic of one site of one layer. `tokens` on one device; `itemsize`: bytes of an activation's number."""
    placement, ways, leaves, rank = placements.of(rule), on.ways("tensor"), [], 0
    for site in placement.owns(rule, name):
        factors = factor_shapes(model, rule, site, segment)
        rank, axes = factors.A.shape[1], placement.axes(factors, site, on.rank_space, experts)
        for leaf, a in zip(jax.tree.leaves(factors), jax.tree.leaves(axes), strict=True):
            split = on.tensor(a)
            size = int(np.prod(leaf.shape)) * 4 // (ways if split else 1)
            leaves.append((size, a.names[0] == "expert", split))
    widths = placement.widths(model.config, name)
    row = [size // ways if on.tensor(Axes((axis,), name)) else size for size, axis in widths]
    sent = rank if on.rank_space and placement.KEPT else row[0]
    return Traffic(
        T=tokens, K=placement.slots(rule, experts, model.config), E=experts,
        row_in=row[0] * itemsize, row_out=row[1] * itemsize,
        frozen=placement.frozen(model.config, name) * kernel_bytes(itemsize, quant) / ways,
        sent=sent * itemsize, ids=4 * placement.IDS, leaves=tuple(leaves), passes=1 if model.remat == "none" else 2,
        last=placement.ends(rule, name), again=_met_before(placement, rule, name),
    )  # fmt: skip


def unchanged_experts(model, *, on: Engine, tokens: int, itemsize: int, quant: str = "none"):
    """`(layers, Traffic)` of a base's own experts where no rule changes them: tokens and kernels meet all the same."""
    placement, config = BaseExperts(), model.config
    for segment in model.segments:
        active = [rule for rule, count in zip(model.rules, segment.counts, strict=True) if count]
        changed = any("experts" in placements.of(rule).NEEDS for rule in active)
        if config.stack_of(segment.start).by_expert and not changed:
            yield len(segment.layers), Traffic(
                T=tokens, K=config.active, E=config.experts, row_in=config.width * itemsize,
                row_out=config.width * itemsize, sent=config.width * itemsize, ids=4 * placement.IDS, leaves=(),
                frozen=placement.frozen(config, "ffn") * kernel_bytes(itemsize, quant) / on.ways("tensor"),
                passes=1 if model.remat == "none" else 2, last=True,
            )  # fmt: skip


def _met_before(placement, rule, name: str) -> bool:
    """Whether an earlier meeting in the layer is with the same factors."""
    meetings = placement.meetings(rule)
    own = set(placement.owns(rule, name))
    return any(own & set(placement.owns(rule, earlier)) for earlier in meetings[: meetings.index(name)])


def refusal(model, on: Engine) -> str:
    """Why the engine cannot serve the model's rules, "" where it can."""
    for rule in model.rules if on.ways("tensor") > 1 else ():
        segment = next(s for s in model.segments if rule.experts[s.start])
        if factor_shapes(model, rule, rule.projections[0], segment).form is not None:
            return (
                f"rule {rule.name}: its experts are no products (adapter.form), of whole rows alone: set mesh.tensor=1"
            )
    if not on.moves_tokens:
        return ""
    for rule, segment, _, name in routed(model):
        adapter, placement = type(rule.adapter), placements.of(rule)
        for site in placement.owns(rule, name):
            reason = placement.stays(factor_shapes(model, rule, site, segment))
            if adapter.latent is not Adapter.latent:
                reason = "its rank activations are changed by leaves that do not travel"
            elif on.rank_space and adapter.DENSE:
                reason = "its inner width is near D, so a row in rank space is no narrower than the token itself"
            elif on.rank_space and not placement.KEPT:
                reason = "its experts need the whole row of width D, so rank_space has nothing to ship"
            if reason:
                return f"{adapter.__name__} of rule {rule.name} on {name}: {reason}"
    for rule in model.rules:
        if rule.router is not None:
            redone = set(placements.of(rule).REDONE)
            for other in model.rules:
                both = redone & set(placements.of(other).acts(other))
                if both and any(a > 1 and b for a, b in zip(rule.experts, other.experts, strict=True)):
                    return (
                        f"rule {other.name} changes gate or up at home, where the experts of rule {rule.name}, "
                        "which need that change, are not"
                    )
        if on.capacity and rule.router is not None and rule.share == "model":
            return f"rule {rule.name} routes once for all layers, so that drops have no layer to be counted in"
    return ""


def table(model, on: Engine, *, tokens: int, itemsize: int, quant: str = "none") -> list[Row]:
    """A row for every engine; `on` gives mesh and options. `tokens` of a micro-step on one device."""
    rows, sizes = [], dict(tokens=tokens, itemsize=itemsize, quant=quant)
    for name in dict.fromkeys((*ENGINES, on.name)):  # the last may be from outside
        own = _named(on, name)
        refused = refusal(model, own) or _emulated(own)
        shipped = useful = 0.0
        for rule, segment, experts, site in routed(model):
            at = own if placements.of(rule).DROPS else dataclasses.replace(own, capacity=0.0)
            asked = traffic(model, rule, segment, experts, site, on=at, **sizes)
            a, b = own.module.bytes_moved(asked, at)
            shipped, useful = shipped + a * len(segment.layers), useful + b * len(segment.layers)
        whole = dataclasses.replace(own, capacity=0.0, rank_space=False)  # a base drops no token
        for layers, asked in unchanged_experts(model, on=whole, **sizes):
            a, b = own.module.bytes_moved(asked, whole)
            shipped, useful = shipped + a * layers, useful + b * layers
        rows.append(Row(name, shipped, useful, refused))
    return rows


def _named(on: Engine, name: str) -> Engine:
    """The same under another engine; one that sends no tokens has no rank space."""
    own = dataclasses.replace(on, name=name)
    return dataclasses.replace(own, rank_space=on.rank_space and own.moves_tokens)


def _emulated(on: Engine) -> str:
    """Said of an engine that a config may ask for, but that `auto` leaves alone on this platform."""
    if on.name == "ragged_all_to_all" and on.mesh.devices.flat[0].platform != "tpu":
        return "emulated by an all-gather on this platform"
    return ""


def choose(rows: list[Row], *, state_bytes: int, memory: int | None) -> tuple[str, str]:
    """`(engine, why)`: fewest bytes of those that can serve; whole experts only while their state is small.

    Args:
      state_bytes: of all experts with gradient and moments; memory: of one device, None where it is not known.
    """
    able = [row for row in rows if not row.refused]
    crowded = memory is not None and state_bytes > memory / 4
    if crowded:
        able = [row for row in able if row.name != "replicate"] or able
    best = min(able, key=lambda row: row.shipped)
    why = f"fewest bytes ({best.shipped / 1e6:,.2f} MB a step and device)"
    if crowded:
        why += f"; whole experts would take {state_bytes / 1e9:.1f} GB, over a quarter of a device's memory"
    return best.name, why


def report(rows: list[Row], name: str, why: str) -> str:
    """The table and the choice, as text for the start of a run."""
    lines = [("engine", "MB shipped", "MB useful", "")]
    for row in rows:
        mark = f"cannot: {row.refused}" if row.refused else "<-" if row.name == name else ""
        lines.append((row.name, f"{row.shipped / 1e6:,.2f}", f"{row.useful / 1e6:,.2f}", mark))
    return f"{columns(lines, right=(1, 2))}\nengine {name}: {why}"


def resolve(
    model, *, engine: str, mesh, capacity: float, rank_space: bool, tokens: int, itemsize: int, quant: str = "none"
):
    """The engine of a run, and the table to print (None on one device, or with nothing to place).

    Raises:
      InputError: the named engine cannot serve the rules.
    """
    on = Engine("replicate" if engine == "auto" else engine, mesh, capacity, rank_space)
    if on.alone:
        return Engine("replicate", mesh), None
    refused = refusal(model, on)
    if refused:
        raise InputError(
            "engine", got=repr(engine), expected=f"an engine that can serve every rule ({refused})",
            fix=f"Set {'expert_parallel.rank_space=False, or ' if rank_space else ''}engine to 'auto', 'gather' or "
            "'replicate'" + (" without it." if rank_space else "."),
        )  # fmt: skip
    rows = table(model, on, tokens=tokens, itemsize=itemsize, quant=quant)
    if engine != "auto":
        name, why = engine, "the config asks for it"
    else:
        name, why = choose(rows, state_bytes=_state_bytes(model), memory=_memory(mesh))
    on = _named(on, name)
    wanted = name != "replicate" or (on.peers > 1 and any(row.shipped for row in rows))
    return on, report(rows, name, why) if wanted else None


def _state_bytes(model) -> int:
    total = 0
    sites = {(rule, s, n) for rule, s, _, name in routed(model) for n in placements.of(rule).owns(rule, name)}
    for rule, segment, site in sites:
        leaves = jax.tree.leaves(factor_shapes(model, rule, site, segment))
        total += sum(int(np.prod(leaf.shape)) for leaf in leaves) * len(segment.layers)
    return total * STATE_BYTES


def _memory(mesh) -> int | None:
    own = mesh.local_devices
    try:
        return (own[0].memory_stats() or {}).get("bytes_limit") if own else None
    except jax.errors.JaxRuntimeError:  # of a topology that is described alone
        return None
