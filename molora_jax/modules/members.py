"""From what a caller writes to members and an engine: instances, names, or dicts as in a config; checked alike."""

import contextlib
import dataclasses
import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
from flax.core import freeze, unfreeze
from jax.sharding import AxisType, Mesh

from molora_jax import inits
from molora_jax.adapters import ADAPTERS
from molora_jax.adapters.base import Adapter
from molora_jax.config import limits, outside
from molora_jax.config import members as config_members
from molora_jax.config.fields import RULE, shown, wrong
from molora_jax.config.rule_checks import adapter_problems, check_counts
from molora_jax.config.values import check_value, member_problems, raise_all
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

    @property
    def random(self) -> list[str]:
        """Fields by which something is random in training."""
        own = [f"router.{name}" for name in (self.router.RANDOM if self.router else ()) if getattr(self.router, name)]
        return ["adapter.dropout"] * bool(self.adapter.dropout) + own


def member(axis: str, value, where: str):
    """A member: an instance, `"lora"`, or `dict(name="lora", rank=8)`; a name may be `package.module:Name`.

    Raises:
      InputError: no such member, an unknown option, a value out of range, a class that breaks its contract.
    """
    table, contract = TABLES[axis]
    if isinstance(value, contract):
        _keeps_contract(axis, value, where)
        described = described_as(axis, value)
        raise_all(_problems(where, described, axis) if "name" in described else _own_limits(value, where))
        return value
    if not isinstance(value, (str, Mapping)):
        raise _no_member(axis, value, where)
    options = {"name": value} if isinstance(value, str) else unfreeze(value)
    raise_all(_problems(where, options, axis))
    return outside.member(axis, table, options.pop("name"))(**options)


def _problems(where: str, options: dict, axis: str) -> list[InputError]:
    return adapter_problems(where, options) if axis == "adapters" else member_problems(where, options, axis)


def _keeps_contract(axis: str, value, where: str) -> None:
    """Raises InputError for an instance of somebody's class that a config could not name either."""
    kind = type(value)
    if kind not in TABLES[axis][0].values():
        lacks, fix = outside.lacks(axis, kind)
        if lacks:
            raise wrong(where, f"a {kind.__name__}, {lacks}", f"a member of {axis}", fix)


def _own_limits(value, where: str) -> list[InputError]:
    """Options out of range, of a class that a config could not name."""
    kind = type(value)
    with contextlib.suppress(InputError):  # fields of types that no config holds are the class's own affair
        options = config_members.options_of(kind, kind.__name__)
        pairs = [(f"{where}.{name}", getattr(value, name), field) for name, field in options.items()]
        return [problem for pair in pairs for problem in check_value(*pair)]
    return []


def _no_member(axis: str, value, where: str) -> InputError:
    """The error for what is neither an instance, nor a name, nor a dict."""
    example = next(iter(TABLES[axis][0].values())).__name__
    expected = f"one of the {axis} such as mj.{example}(), a name, or a dict as in a config"
    if isinstance(value, type):
        same = outside.axis_of(value) == axis
        fix = f"Make one of it: {value.__name__}()." if same else config_members.as_text(axis, value)
        return wrong(where, f"the class {value.__name__}", expected, fix)
    return wrong(where, shown(value), expected, config_members.as_text(axis, value))


def described_as(axis: str, value) -> dict:
    """A member as a config has it; without a name where a config could not name its class."""
    name = next((name for name, kind in TABLES[axis][0].items() if type(value) is kind), None)
    path = f"{type(value).__module__}:{type(value).__qualname__}"
    name = path if name is None and config_members.is_member(axis, path) else name
    options = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(options.get("init"), inits.Start):
        start = options["init"]
        options["init"] = {f.name: getattr(start, f.name) for f in dataclasses.fields(start)}
        options["init"]["name"] = inits.name_of(start)
    return options | ({} if name is None else {"name": name})


def engine_of(engine, mesh: Mesh | None) -> Engine:
    """Args:
    engine: a name of `ENGINES`, or an `Engine` with its own mesh and options.
    mesh: with axes among data, fsdp, expert and tensor; those that it lacks have one device.
    """
    given = engine if isinstance(engine, Engine) else None
    if given is not None:
        if mesh is not None and given.mesh is not None:
            fix = f"Leave it out, or write engine={given.name!r}."
            raise wrong("mesh", f"one beside an Engine ({given.name}) with a mesh of its own", "one of the two", fix)
        engine, mesh = given.name, given.mesh if mesh is None else mesh
    problem = config_members.member_problem("engine", "engines", engine)
    if problem:
        raise problem
    _check_mesh(mesh)
    if mesh is None:
        if engine != "replicate":
            fix = 'Pass one: mesh=jax.make_mesh((8,), ("expert",)).'
            raise wrong("mesh", f"none, with engine {engine!r}", "the mesh whose axis expert divides the experts", fix)
        return ALONE if given is None else given
    return Engine(engine, _whole(mesh)) if given is None else dataclasses.replace(given, mesh=_whole(mesh))


def _check_mesh(mesh) -> None:
    if mesh is not None and not isinstance(mesh, Mesh):
        number = mesh if isinstance(mesh, int) else 8
        fix = f'Make one: mesh=jax.make_mesh(({number},), ("expert",)).'
        raise wrong("mesh", f"{shown(mesh)} (a {type(mesh).__name__})", "a jax.sharding.Mesh", fix)


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
    for name, value in dict(down=down, shrink=gates_scale_base).items():
        raise_all(check_value(f"{where}.{name}", value, RULE[name]))
    if not isinstance(engine, (str, Engine)) or not isinstance(mesh, (Mesh, type(None))):
        engine_of(engine, mesh)
    for name, value in dict(experts=experts, adapter=adapter, router=router).items():
        _check_hash(f"{where}.{name}", value, {"adapter": "adapters", "router": "routers"}.get(name))
    written = repr((experts, adapter, router))  # 4 and 4.0 are equal, and one of them is wrong
    return _made(where, placement, sites, experts, adapter, router, engine, mesh, down, gates_scale_base, written)


def _check_hash(where: str, value, axis: str | None) -> None:
    """Raises InputError for what cannot be static: a module is compiled for the values of its fields."""
    try:
        hash(value)
    except TypeError as error:
        if axis is not None:
            member(axis, value, where)  # which option it is
        fix = "Write tuples for lists; a member is a frozen dataclass of numbers, text and tuples."
        raise wrong(where, f"{shown(value)}, which cannot be hashed ({error})", "a value that can", fix) from None


@functools.lru_cache(maxsize=1024)
def _made(
    where, placement, sites, experts, adapter, router, engine, mesh, down, gates_scale_base, written: str
) -> Made:  # fmt: skip
    adapter = member("adapters", adapter, f"{where}.adapter")
    router = None if router is None else member("routers", router, f"{where}.router")
    count = int(experts) if isinstance(experts, str) and experts.isdigit() else experts
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise wrong(f"{where}.experts", shown(experts), "an integer >= 1")
    _check_start(f"{where}.adapter.init", adapter)
    described = {"experts": str(count), "down": down, "adapter": described_as("adapters", adapter)}
    if router is not None:
        described["router"] = described_as("routers", router)
        _stands_alone(where, router)
    if all("name" in described[axis] for axis in ("adapter", "router") if axis in described):  # others say no limits
        raise_all(list(check_counts(where, described, (count,))))
        own = [(limits.AXES[group], described[group]["name"]) for group in ("adapter", "router") if group in described]
        for axis, name in [("placements", placement), *own]:
            raise_all(list(limits.refused(where, described, limits.states(axis, name, "REFUSES"), start="")))
    return Made(Rule(where, sites, (count,), adapter, router, down, gates_scale_base), engine_of(engine, mesh))


def _check_start(where: str, adapter: Adapter) -> None:
    """Raises InputError for a start that the adapter cannot take, or one that only a run can give."""
    init = inits.name_of(adapter.init) if isinstance(adapter.init, inits.Start) else adapter.init
    strange = config_members.member_problem(where, "inits", init)
    if strange:
        raise strange
    name, states = type(adapter).__name__, lambda wanted: outside.stated_with(type(adapter), wanted, "factors")
    if limits.states("inits", init, "AWAY") and not states("SUBTRACTS"):
        expected = f"a start of B A = 0: {name}.factors does not say that it takes A0, B0 off (SUBTRACTS)"
        raise wrong(where, repr(init), expected, 'Use init="kaiming".')
    if bool(limits.states("inits", init, "CORE")) != bool(states("CORE")):
        raise wrong(where, repr(init), f"a start {'with' if states('CORE') else 'without'} a core, for {name}")
    if "base_grad" in (limits.states("inits", init, "NEEDS") or ()):
        fix = "That gradient is taken by a run of this library (`python -m launch.train`), not by a single layer."
        raise wrong(where, repr(init), "a start that reads no gradient of the base", fix)


def _stands_alone(where: str, router: Router) -> None:
    """Raises InputError for a router that needs more than the layer that it stands in."""
    need = ""
    if router.INPUT:
        need = "the frozen base's last hidden state"
    elif jax.tree.leaves(jax.eval_shape(lambda: router.init_carry(1, 1))):
        need = "what it handed on from the layer before"
    elif type(router).input_of is not Router.input_of:
        need = "the rank activations of an adapter"
    if need:
        raise InputError(
            f"{where}.router", got=f"{type(router).__name__}, which reads {need}",
            expected="a router that decides from the layer's own input",
            fix="That one works in a run of this library (`python -m launch.train`), not in a single layer.",
        )  # fmt: skip
