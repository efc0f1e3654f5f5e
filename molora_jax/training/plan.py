"""Does a run fit, and what would bound it? The real step, compiled for devices that need not be here.

Memory of a device: base, adapters and optimizer as they lie on the mesh; activations, what the loop over layers keeps
of its inputs at least; temp, all else that the compiler asks for. Roofline: the greatest of three times, which may
overlap: FLOPs (`flops.per_token`) over peak, the base's bytes (as often as the layers run) over the memory's bandwidth,
the collectives' bytes over the links'. Where a group spans hosts of GPUs, those of a host share the sending, over the
network, if that takes longer. Nominal figures of a chip: `CHIPS`.
"""

import dataclasses
import itertools
import math
import os
import re
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from kernels_pallas.select import DEVICES
from molora_jax import config as config_lib
from molora_jax import sharding
from molora_jax.backbones.base import Backbone
from molora_jax.backbones.compile import compile_model
from molora_jax.backbones.sizes import base_shapes
from molora_jax.config.resolve import split_commas
from molora_jax.core.trees import num_bytes
from molora_jax.data.packing import empty_batch
from molora_jax.engines import hlo
from molora_jax.errors import InputError
from molora_jax.regimes import compile_regime
from molora_jax.runs.modules import compile_modules
from molora_jax.training import gpus
from molora_jax.training.flops import per_token
from molora_jax.training.programs import compiled_step, knobs_of, program_of
from molora_jax.training.setup import with_engine

GIB = 2**30
USABLE = 0.92  # of a TPU's memory: the runtime keeps some
TRIES = 4  # compilations of a plan whose mesh and batch are the planner's
SEGMENTS = 8  # examples a packed row


@dataclasses.dataclass(frozen=True)
class Chip:
    """Bytes of memory, of which a run gets a part (`usable`); bytes/s of one direction of its `links` (all of them) and
    of the `network` between hosts of GPUs, a GPU; its entry in DEVICES. Of a CPU nothing is known."""

    memory: int | None = None
    links: float | None = None
    key: str | None = None
    network: float | None = None

    @property
    def usable(self) -> float | None:
        """Bytes. jax takes a fixed part of a GPU's memory at its start."""
        if self.memory is None:
            return None
        return self.memory * (float(os.environ.get(FRACTION, 0.75)) if self.network else USABLE)


FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"
CHIPS = {
    "v5e": Chip(16 * GIB, 200e9, "v5e"),
    "v6e": Chip(32 * GIB, 448e9, "v6"),
    "v5p": Chip(95 * GIB, 600e9, "v5p"),
    "tpu7x": Chip(192 * GIB, 1200e9, "tpu7x"),
    "a100": Chip(gpus.GPUS["a100"].memory, 300e9, "a100", 25e9),
    "h100": Chip(gpus.GPUS["h100"].memory, 450e9, "h100", 50e9),
    "h200": Chip(gpus.GPUS["h200"].memory, 450e9, "h200", 50e9),
    "b200": Chip(gpus.GPUS["b200"].memory, 900e9, "b200", 50e9),
    "cpu": Chip(),
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """`memory` in bytes of a device, `collectives` of a step and device; `why` and `advice` in words."""

    fits: bool
    memory: dict[str, int]
    collectives: list[dict]
    compile_s: float
    engine: str
    why: str
    roofline_s: float | None
    bound: str
    mesh: dict[str, int]
    batch: int
    seq_len: int
    dtype: str
    devices: int
    kind: str
    limit: int | None
    usable: float | None
    advice: str = ""


def _quiet(text: str) -> None:
    """Says nothing."""


def plan(config, backbone: Backbone, devices, chip: str, *, own_mesh: bool, own_batch: bool, note=_quiet) -> Plan:
    """The plan of a run.

    Args:
      config: its mesh is taken where `own_mesh`, its batch where `own_batch`; else they are chosen.
      backbone: of the base; no weights are read. devices: of a topology, or those of this machine.
      chip: a name of `CHIPS`.

    Raises:
      InputError: a mesh that does not fit the devices or the base, a regime that is not planned.
    """
    if config.get("regime", {}).get("name", "stages") != "stages":
        raise InputError("regime.name", got=repr(config.regime.name), expected="'stages'", fix="Plan one stage of it.")
    if config.mesh.get("dcn", 1) > 1:
        raise InputError(
            "mesh.dcn", got=str(config.mesh.dcn), expected="1: topologies are of one slice",
            fix="Plan one slice, with its part of train.batch_size.",
        )  # fmt: skip
    limit = CHIPS[chip].usable
    made = None
    for mesh, batch in _candidates(config, backbone, devices, limit, own_mesh, own_batch):
        on = sharding.axes_text(mesh) or "one device"
        note(f"compiling the step for {on}, {batch} rows of {config.data.seq_len} tokens")
        made = _compiled(config, backbone, devices, chip, mesh, batch)
        if made.fits:
            return made
    return dataclasses.replace(made, advice=_advice(made, own_mesh, own_batch))


def _candidates(config, backbone, devices, limit, own_mesh, own_batch):
    """`(mesh, batch)` from what is likely to be fastest to what needs least memory."""
    N = len(devices)
    base = num_bytes(_base(config, backbone))
    if own_mesh:
        meshes = [config_lib.check_mesh(config, N)]
    else:
        fsdp = next((n for n in _divisors(N) if limit is None or base / n <= 0.45 * limit), N)
        meshes = [_mesh(N, n) for n in _divisors(N) if n >= fsdp]
    count = 0
    for mesh in meshes:
        ways = math.prod(mesh[axis] for axis in sharding.ROWS)
        rows = [config.train.batch_size]
        if not own_batch:
            each = max(1, 4096 // config.data.seq_len)
            accumulate = config.train.accumulate
            rows = [ways * accumulate * n for n in sorted({each, max(1, each // 4), 1}, reverse=True)]
        for batch in rows:
            count += 1
            if count > TRIES:
                return
            yield mesh, batch


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0 and (d & (d - 1)) == 0 or d == n]


def _mesh(N: int, fsdp: int) -> dict[str, int]:
    return dict(data=N // fsdp, fsdp=fsdp, expert=1, tensor=1)


def _compiled(config, backbone, devices, chip, sizes, batch) -> Plan:
    config = config_lib.from_dict({**config_lib.to_dict(config), "mesh": sizes})
    with config.unlocked():
        config.train.batch_size = batch
    config_lib.check_mesh(config, len(devices))
    config_lib.check_model(config, backbone.layers, backbone.dims, backbone.ABSENT)
    mesh, dtype = sharding.make_mesh(sizes, devices), jnp.dtype(config.base.dtype)
    shapes = _base(config, backbone)
    where = sharding.param_shardings(backbone, shapes, mesh)
    params = jax.tree.map(lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), shapes, where)
    tasks = tuple(split_commas(config.data.tasks))
    model = compile_model(config, backbone, max_segments=SEGMENTS, tasks=tasks)
    model, table = with_engine(config, model, mesh)
    modules = compile_modules(config, params, width=backbone.width, classes=2)
    regime = compile_regime(config)
    run = types.SimpleNamespace(
        config=config, model=model, modules=modules, mesh=mesh, params=params, regime=regime, data=None, newest=None,
        base=types.SimpleNamespace(config=backbone), note=_quiet, targets_per_row=config.data.seq_len, exact=False,
    )  # fmt: skip
    stage = regime.stages(config, None)[-1]
    step = compiled_step(run, program_of(run, stage))
    rows, knobs = _rows(config, mesh, batch), _whole(knobs_of(stage.config), mesh)
    began = time.monotonic()
    try:
        with jax.set_mesh(mesh):  # for tracing alone: what is computed in here would be computed on those devices
            lowered = step.step.lower(step.loop_shapes, params, rows, {}, knobs)
            program = lowered.compile(gpus.COMPILE if chip in gpus.GPUS else None)
    except jax.errors.JaxRuntimeError as error:
        temp, needed = _asked_for(str(error))
        if temp is None and needed is None:
            raise
        program = None
    seconds, S = time.monotonic() - began, config.data.seq_len
    state = step.shapes
    adapters = _on_device((state.adapters, state.modules, state.router_state))
    memory = dict(base=_on_device(params), adapters=adapters, optimizer=_on_device(state.opt))
    chip = CHIPS[chip]
    if program is None:
        temp = max(0, needed - sum(memory.values())) if temp is None else temp
        memory |= dict(activations=0, temp=temp)
        memory["total"] = sum(memory.values())
        found = []
    else:
        asked = program.memory_analysis()
        tokens = batch * S // config.train.accumulate // sharding.ways(mesh, sharding.ROWS)
        kept = min(tokens * backbone.width * backbone.layers * dtype.itemsize, asked.temp_size_in_bytes)
        memory |= dict(activations=kept, temp=asked.temp_size_in_bytes - kept)
        memory["total"] = (
            asked.argument_size_in_bytes + asked.output_size_in_bytes - asked.alias_size_in_bytes
            + asked.temp_size_in_bytes + asked.generated_code_size_in_bytes
        )  # fmt: skip
        found = _collectives(program.as_text(), mesh, backbone.layers)
    roofline, bound = None, "unknown: no figures of this chip"
    if chip.key is not None and program is not None:
        flops = per_token(model, step.shapes.adapters, step.shapes.modules, step.program.frozen, S) * batch * S
        passes = (3 if config.train.remat == "full" else 2) * config.train.accumulate
        read = passes * num_bytes(shapes) / sizes["tensor"]
        times = {
            "compute": flops / len(devices) / DEVICES[chip.key].flops_per_second,
            "memory": read / DEVICES[chip.key].bytes_per_second,
            "collectives": sum(_seconds(c, mesh, chip) for c in found),
        }
        bound = max(times, key=times.get)
        roofline = times[bound]
        bound += " (" + ", ".join(f"{name} {1e3 * t:.3g} ms" for name, t in times.items()) + ")"
    why = "one device" if mesh.size == 1 else "nothing to place" if table is None else table.splitlines()[-1]
    return Plan(
        fits=program is not None and (chip.usable is None or memory["total"] <= chip.usable), memory=memory,
        collectives=found, compile_s=round(seconds, 1), engine=model.engine.name, why=why, roofline_s=roofline,
        bound=bound, mesh=dict(sizes), batch=batch, seq_len=S, dtype=_form(config), devices=len(devices),
        kind=devices[0].device_kind, limit=chip.memory, usable=chip.usable,
    )  # fmt: skip


def _base(config, backbone) -> dict:
    return base_shapes(backbone, jnp.dtype(config.base.dtype), config.base.get("quant", "none"))


def _form(config) -> str:
    """`bfloat16`, or `bfloat16 and nf4`."""
    quant = config.base.get("quant", "none")
    return config.base.dtype if quant == "none" else f"{config.base.dtype} and {quant}"


def _rows(config, mesh, batch: int) -> dict:
    """The arrays of a batch, as shapes."""
    at, rows = sharding.row_sharding(mesh), empty_batch(batch, config.data.seq_len, pad_id=0)
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at) for name, x in rows.items()}


def _whole(tree, mesh):
    at = NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), np.asarray(x).dtype, sharding=at), tree)


def _on_device(tree) -> int:
    """Bytes of a device, of shapes with shardings."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def _asked_for(message: str) -> tuple[int | None, int | None]:
    """Bytes that a compiler wanted when it gave up, `(temporaries, all)`, of which it says one or none.

    `Used 23.45G of 15.75G hbm`, or `HLO temporaries (19.24G) exceeds available HBM`.
    """
    found = [
        re.search(form, message) for form in (r"HLO temporaries \(([\d.]+)([KMGT])\)", r"Used ([\d.]+)([KMGT]) of")
    ]
    return tuple(m and int(float(m[1]) * 1024 ** ("KMGT".index(m[2]) + 1)) for m in found)


def _collectives(text: str, mesh, layers: int) -> list[dict]:
    """Of a step: a loop without a trip count (the TPU's compiler writes none) is that over the layers."""
    rows: dict = {}
    for c in hlo.collectives(text, mesh.size):
        times = layers if c.loop and c.times == 1 else c.times
        if c.devices > 1:
            row = rows.setdefault((c.kind, _axis(c.devices, mesh)), [0, 0.0])
            row[0] += times
            row[1] += c.bytes_moved / c.times * times
    return [dict(kind=kind, count=n, bytes=int(size), axis=axis) for (kind, axis), (n, size) in sorted(rows.items())]


def _axis(count: int, mesh) -> str:
    """The mesh axes that a group of so many devices spans; joined by `or` where several have that size."""
    axes = [axis for axis, size in mesh.shape.items() if size > 1]
    if count == mesh.size:
        return ALL if len(axes) > 1 else axes[0]
    groups = [some for n in (1, 2, 3) for some in itertools.combinations(axes, n)]
    found = [some for some in groups if math.prod(mesh.shape[axis] for axis in some) == count]
    fewest = [some for some in found if len(some) == len(found[0])]
    return " or ".join("+".join(some) for some in fewest) or PART


ALL, PART = "all", "part of an axis"


def _seconds(collective: dict, mesh, chip: Chip) -> float:
    """The least time of a row of `collectives`; of the axes that it may run over, the slowest."""
    size, axis = collective["bytes"], collective["axis"]
    slowest = size / chip.links
    if chip.network is None or axis == PART:
        return slowest
    for axes in [list(mesh.shape)] if axis == ALL else [group.split("+") for group in axis.split(" or ")]:
        a_host = _of_a_host(axes, mesh)
        if a_host < math.prod(mesh.shape[name] for name in axes):
            slowest = max(slowest, size / a_host / chip.network)
    return slowest


def _of_a_host(axes, mesh) -> int:
    """Of the devices in a group over these axes, how many at most are of one host."""
    hosts = np.vectorize(lambda device: device.process_index)(mesh.devices)
    last = [mesh.axis_names.index(axis) for axis in axes]
    groups = np.moveaxis(hosts, last, range(-len(last), 0)).reshape(-1, math.prod(mesh.shape[axis] for axis in axes))
    return max(int(np.bincount(group).max()) for group in groups)


def _advice(made: Plan, own_mesh: bool, own_batch: bool) -> str:
    """What would fit, for a plan that does not."""
    fixed, memory = made.memory["base"] + made.memory["adapters"] + made.memory["optimizer"], made.memory
    room = made.usable
    ideas = []
    if fixed > room:
        more = made.mesh["fsdp"] * made.mesh["tensor"] * 2 ** math.ceil(math.log2(fixed / room))
        ideas.append(f"base, adapters and optimizer alone are more than a chip has: split them {more} ways (mesh.fsdp)")
    elif memory["total"] > room:
        rows = made.batch // (made.mesh["data"] * made.mesh["fsdp"] * made.mesh["expert"])
        if rows > 1:
            ideas.append(f"{rows} rows a device: try fewer, or train.accumulate={rows}")
        ideas.append("train.remat=full, and a shorter data.seq_len")
    if made.dtype.startswith("float32"):
        ideas.append("base.dtype=bfloat16")
    if " " not in made.dtype:
        ideas.append("base.quant=nf4")
    ideas.append("a topology of more chips")
    return "; ".join(ideas)
