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

from molora_jax.adapters.base import Adapter
from molora_jax.core import rules as rules_lib
from molora_jax.core.types import Context
from molora_jax.engines.base import ROW_SITES, Engine, Load
from molora_jax.engines.shard import ENGINES
from molora_jax.errors import InputError
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
    return _factor_shapes(rule.adapter, rules_lib.site(model.config, name, segment, rule))


@functools.cache  # of every site of every layout of layers, under every engine
def _factor_shapes(adapter, at):
    W = jax.ShapeDtypeStruct((at.d_in, at.d_out), jnp.float32)

    def make(key, W):
        leaves = adapter.init_leaves(key, at, 0, base=W, base_grad=W)
        shared = adapter.init_shared(key, (at,))
        zeros = jnp.zeros((1, 1), jnp.int32)
        ctx = Context(zeros > 0, zeros, zeros, zeros, zeros, base=W, site=at, key=key, step_key=key)
        return adapter.factors(leaves, shared, ctx)

    return jax.eval_shape(make, jax.random.key(0), W)


def routed(model):
    """`(rule, segment, E, site)` of every routed site in every segment; an FFN is one site. A chain has no engine."""
    for r, rule in enumerate(model.rules):
        for segment in model.segments:
            if rule.router is not None and segment.counts[r] > 1 and rule.placement != "chain":
                for name in ("ffn",) if rule.placement == "ffn" else rule.sites:
                    yield rule, segment, segment.counts[r], name


def load(model, rule, segment, experts: int, name: str, *, on: Engine, tokens: int, itemsize: int) -> Load:
    """The load of one site of one layer. `tokens` on one device; `itemsize`: bytes of an activation's number."""
    ways, leaves, rank = on.ways("tensor"), [], 0
    keeps_A = on.rank_space and rule.placement == "projection"  # whole on every device, as `adapter_shardings` has it
    for site in rule.projections if name == "ffn" else (name,):
        factors = factor_shapes(model, rule, site, segment)
        rank = factors.A.shape[1]
        for leaf, at_input in ((factors.A, True), (factors.B, False), (factors.out, False), (factors.inp, True)):
            if leaf is not None:
                split = at_input == (site in ROW_SITES)
                size = int(np.prod(leaf.shape)) * 4 // (ways if split else 1)
                leaves.append((size, leaf.shape[0] == experts and not (keeps_A and leaf is factors.A), split))
        if factors.mid is not None:
            leaves.append((int(np.prod(factors.mid.shape)) * 4, True, False))
    d_in, d_out = (model.config.width,) * 2 if name == "ffn" else model.config.dims(name)
    d_in, d_out = (d_in // ways, d_out) if name in ROW_SITES else (d_in, d_out if name == "ffn" else d_out // ways)
    return Load(
        T=tokens, K=rule.router.k_max(experts), E=experts, row_in=d_in * itemsize, row_out=d_out * itemsize,
        rank_bytes=rank * itemsize, leaves=tuple(leaves), placement=rule.placement,
        passes=1 if model.remat == "none" else 2, last=name in ("ffn", "down"),
    )  # fmt: skip


def refusal(model, on: Engine) -> str:
    """Why the engine cannot serve the model's rules, "" where it can."""
    module = ENGINES[on.name]
    for rule, segment, _, name in routed(model):
        adapter = type(rule.adapter)
        for site in rule.projections if name == "ffn" else (name,):
            factors, latent = factor_shapes(model, rule, site, segment), adapter.latent is not Adapter.latent
            reason = module.refuses(factors, placement=rule.placement, latent=latent, on=on)
            if reason:
                return f"{adapter.__name__} of rule {rule.name} on {name}: {reason}"
    if not on.moves_tokens:
        return ""
    for rule in model.rules:
        if rule.placement == "ffn" and rule.router is not None:
            for other in model.rules:
                both = other.placement == "projection" and {"gate", "up"} & set(other.sites)
                if both and any(a > 1 and b for a, b in zip(rule.experts, other.experts, strict=True)):
                    return (
                        f"rule {other.name} changes gate or up at home, where the experts of rule {rule.name}, "
                        "which need that change, are not"
                    )
        if on.capacity and rule.router is not None and rule.share == "model":
            return f"rule {rule.name} routes once for all layers, so that drops have no layer to be counted in"
    return ""


def table(model, on: Engine, *, tokens: int, itemsize: int) -> list[Row]:
    """A row for every engine; `on` gives mesh and options. `tokens` of a micro-step on one device."""
    rows = []
    for name, module in ENGINES.items():
        own = _named(on, name)
        refused = refusal(model, own) or _emulated(own)
        shipped = useful = 0.0
        for rule, segment, experts, site in routed(model):
            one = load(model, rule, segment, experts, site, on=own, tokens=tokens, itemsize=itemsize)
            a, b = module.bytes_moved(one, own)
            shipped, useful = shipped + a * len(segment.layers), useful + b * len(segment.layers)
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


def resolve(model, *, engine: str, mesh, capacity: float, rank_space: bool, tokens: int, itemsize: int):
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
            fix="Set engine to 'gather', 'replicate' or 'auto'.",
        )  # fmt: skip
    rows = table(model, on, tokens=tokens, itemsize=itemsize)
    if engine != "auto":
        name, why = engine, "the config asks for it"
    else:
        name, why = choose(rows, state_bytes=_state_bytes(model), memory=_memory(mesh))
    on = _named(on, name)
    wanted = name != "replicate" or (on.peers > 1 and any(True for _ in routed(model)))
    return on, report(rows, name, why) if wanted else None


def _state_bytes(model) -> int:
    total = 0
    for rule, segment, _, name in routed(model):
        for site in rule.projections if name == "ffn" else (name,):
            leaves = jax.tree.leaves(factor_shapes(model, rule, site, segment))
            total += sum(int(np.prod(leaf.shape)) for leaf in leaves) * len(segment.layers)
    return total * STATE_BYTES


def _memory(mesh) -> int | None:
    stats = mesh.local_devices[0].memory_stats() or {}
    return stats.get("bytes_limit")
