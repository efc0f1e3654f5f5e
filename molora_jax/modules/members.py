"""From what a caller writes to members and an engine: instances, names, or dicts as in a config; checked alike."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
from flax.core import freeze
from jax.sharding import AxisType, Mesh

from molora_jax.adapters import ADAPTERS
from molora_jax.adapters.base import Adapter
from molora_jax.config import limits, outside
from molora_jax.config import members as config_members
from molora_jax.config.fields import shown, wrong
from molora_jax.config.rule_checks import check_counts, check_start
from molora_jax.config.values import member_problems, raise_all
from molora_jax.core.rules import Rule
from molora_jax.engines import ALONE, Engine
from molora_jax.errors import InputError
from molora_jax.losses import LOSSES
from molora_jax.losses.base import Loss
from molora_jax.routers import ROUTERS
from molora_jax.routers.base import Router
from molora_jax.sharding import AXES

TABLES = {"adapters": (ADAPTERS, Adapter), "routers": (ROUTERS, Router), "losses": (LOSSES, Loss)}


class Made(NamedTuple):
    """What a module is made of."""

    rule: Rule
    engine: Engine

    @property
    def adapter(self) -> Adapter:
        return self.rule.adapter

    @property
    def router(self) -> Router | None:
        return self.rule.router

    @property
    def experts(self) -> int:
        return self.rule.experts[0]


def member(axis: str, value, where: str):
    """A member: an instance, `"lora"`, or `dict(name="lora", rank=8)`; a name may be `package.module:Name`.

    Raises:
      InputError: no such member, an unknown option, a value out of range.
    """
    table, contract = TABLES[axis]
    if isinstance(value, contract):
        described = described_as(axis, value)
        if "name" in described:
            raise_all(member_problems(where, described, axis))
        return value
    options = {"name": value} if isinstance(value, str) else dict(value) if isinstance(value, Mapping) else value
    raise_all(member_problems(where, options, axis))
    return outside.member(axis, table, options.pop("name"))(**options)


def described_as(axis: str, value) -> dict:
    """A member as a config has it; without a name where a config could not name its class."""
    name = next((name for name, kind in TABLES[axis][0].items() if type(value) is kind), None)
    path = f"{type(value).__module__}:{type(value).__qualname__}"
    name = path if name is None and config_members.is_member(axis, path) else name
    options = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return options | ({} if name is None else {"name": name})


def engine_of(engine, mesh: Mesh | None) -> Engine:
    """Args:
    engine: a name of `ENGINES`, or an `Engine` with its own mesh and options.
    mesh: with axes among data, fsdp, expert and tensor; those that it lacks have one device.
    """
    if isinstance(engine, Engine):
        return engine
    problem = config_members.member_problem("engine", "engines", engine)
    if problem:
        raise problem
    if mesh is None:
        if engine != "replicate":
            fix = 'Pass one: mesh=jax.make_mesh((8,), ("expert",)).'
            raise wrong("mesh", f"none, with engine {engine!r}", "the mesh whose axis expert divides the experts", fix)
        return ALONE
    return Engine(engine, _whole(mesh))


def _whole(mesh: Mesh) -> Mesh:
    """The same devices on a mesh of all four axes."""
    if set(mesh.axis_names) - set(AXES):
        fix = "Lay the same devices out on a mesh with these names for the routed layers."
        raise wrong("mesh", f"axes {', '.join(map(str, mesh.axis_names))}", f"axes among {', '.join(AXES)}", fix)
    order = [name for name in AXES if name in mesh.axis_names]
    devices = np.transpose(mesh.devices, [mesh.axis_names.index(name) for name in order])
    sizes = dict(zip(order, devices.shape, strict=True))
    return Mesh(devices.reshape([sizes.get(name, 1) for name in AXES]), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def made(
    where: str, placement: str, sites: tuple[str, ...], experts, adapter, router, engine, mesh, down="once",
    gates_scale_base=False,
) -> Made:  # fmt: skip
    """All of a module's parts, checked together as a config's rule is.

    Raises:
      InputError: whatever is wrong with them; `where` names the module.
    """
    adapter, router = (freeze(dict(value)) if isinstance(value, Mapping) else value for value in (adapter, router))
    return _made(where, placement, sites, experts, adapter, router, engine, mesh, down, gates_scale_base)


@functools.lru_cache(maxsize=1024)
def _made(where, placement, sites, experts, adapter, router, engine, mesh, down, gates_scale_base) -> Made:
    adapter = member("adapters", adapter, f"{where}.adapter")
    router = None if router is None else member("routers", router, f"{where}.router")
    count = int(experts) if isinstance(experts, str) and experts.isdigit() else experts
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise wrong(f"{where}.experts", shown(experts), "an integer >= 1")
    init = config_members.member_problem(f"{where}.adapter.init", "inits", adapter.init)
    if init:
        raise init
    described = {"experts": str(count), "down": down, "adapter": described_as("adapters", adapter)}
    if router is not None:
        described["router"] = described_as("routers", router)
        _stands_alone(where, router)
    if all("name" in described[axis] for axis in ("adapter", "router") if axis in described):  # others say no limits
        raise_all([*check_counts(where, described, (count,)), *check_start(where, described)])
        raise_all(list(limits.refused(where, described, limits.states("placements", placement, "REFUSES"), start="")))
    return Made(Rule(where, sites, (count,), adapter, router, down, gates_scale_base), engine_of(engine, mesh))


def _stands_alone(where: str, router: Router) -> None:
    """Raises InputError for a router that needs more than the layer that it stands in."""
    need = ""
    if router.INPUT:
        need = "the frozen base's last hidden state"
    elif jax.tree.leaves(jax.eval_shape(lambda: router.init_carry(1, 1))):
        need = "what it handed on from the layer before"
    if need:
        raise InputError(
            f"{where}.router", got=f"{type(router).__name__}, which reads {need}",
            expected="a router that decides from the layer's own input",
            fix="That one works in a run of this library (`python -m launch.train`), not in a single layer.",
        )  # fmt: skip
