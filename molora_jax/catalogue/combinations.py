"""adapter x router x placement x engine: every point works, or is refused with the reason. Makes docs/combinations.md.

    python -m launch.docs

A point is one rule with the members' own defaults, experts shared out over a mesh axis `expert` of 2. It is asked what
a run asks before its first step: the config's checks (refused: "config"), and the engine (`engines/auto.refusal`).
"""

import dataclasses
import itertools

from jax.sharding import AbstractMesh

from molora_jax import config as config_lib
from molora_jax.adapters import ADAPTERS
from molora_jax.backbones.compile import compile_model
from molora_jax.backbones.families import TINY, TINY_MOE
from molora_jax.engines import ENGINES, Engine, auto
from molora_jax.errors import InputError
from molora_jax.placements import PLACEMENTS
from molora_jax.routers import ROUTERS
from molora_jax.sharding import AXES

MESH = AbstractMesh(tuple(2 if axis == "expert" else 1 for axis in AXES), AXES)
EXPERTS = 8


@dataclasses.dataclass(frozen=True)
class Point:
    """`router` "none" is a single expert."""

    adapter: str
    router: str
    placement: str
    engine: str


@dataclasses.dataclass(frozen=True)
class Verdict:
    """`by`: "" where the point works, else who refuses it (`config` or `engine`). `down`: of a routed FFN."""

    by: str = ""
    reason: str = ""
    down: str = "once"


def points() -> list[Point]:
    product = itertools.product(ADAPTERS, ("none", *ROUTERS), PLACEMENTS, ENGINES)
    return [Point(*names) for names in product]


def config_of(point: Point, defaults, *, down: str = "once"):
    """The config of a point; not validated."""
    sites = [s for s in PLACEMENTS[point.placement].SITES if s == "ffn" or s not in decoder_of(point).ABSENT]
    rule = dict(
        sites=",".join(sites), layers="all",
        experts="1" if point.router == "none" else str(EXPERTS), load=(),
        adapter=dict(name=point.adapter, **small(point.adapter), dropout=0.0), down=down, shrink=False,
    )  # fmt: skip
    if point.router != "none":
        rule["router"] = dict(name=point.router)
    if PLACEMENTS[point.placement].NAMED:
        rule["placement"] = dict(name=point.placement)
    config = defaults.copy_and_resolve_references()
    with config.unlocked():
        config.method.rules = dict(mix=rule)
        config.engine = point.engine
        config.base.source = "random:tiny-moe" if PLACEMENTS[point.placement].NEEDS else "random:tiny"
    return config


def small(adapter: str, **options) -> dict:
    """Rank and scale of a small adapter, without those that it does not have (their default is 0)."""
    own, options = ADAPTERS[adapter](), {"rank": 4, "alpha": 8.0} | options
    return {field: value for field, value in options.items() if getattr(own, field)}


def decoder_of(point: Point):
    """A small base that the placement is for."""
    return TINY_MOE if PLACEMENTS[point.placement].NEEDS else TINY


def verdict(point: Point, defaults) -> Verdict:
    """What a run of this point would be told."""
    return of_engine(point, of_config(point, defaults))


def of_config(point: Point, defaults):
    """What its config is told: the Verdict that refuses it, or `(down, model)` of the form that works."""
    refused = None
    decoder = decoder_of(point)
    for down in ("once", "per_expert"):
        config = config_of(point, defaults, down=down)
        try:
            config_lib.validate(config)
            config_lib.check_model(config, decoder.layers, decoder.dims, decoder.ABSENT)
            return down, compile_model(config, decoder)
        except InputError as error:
            fix = error.fix.partition("\n  and ")[0]  # of several mistakes the first
            reason = fix if ": " in fix else error.expected
            refused = refused or Verdict("config", reason.partition(": set ")[0])
    return refused


def of_engine(point: Point, told) -> Verdict:
    """What the point's engine adds to what its config is told."""
    if isinstance(told, Verdict):
        return told
    down, model = told
    reason = auto.refusal(model, Engine(point.engine, MESH))
    return Verdict("engine", reason.partition(": ")[2] or reason, down) if reason else Verdict(down=down)


def walk(defaults) -> dict[Point, Verdict]:
    """The verdict of every point. A config is asked once for all engines: it is told the same under each."""
    found = {}
    for _, alike in itertools.groupby(points(), key=lambda p: (p.adapter, p.router, p.placement)):
        alike = list(alike)
        told = of_config(alike[0], defaults)
        found |= {point: of_engine(point, told) for point in alike}
    return found


def document(found: dict[Point, Verdict]) -> str:
    """Two tables: what the config says (adapter and placement against router), then what the engines say."""
    notes: dict[str, int] = {}

    def config_cell(v: Verdict) -> str:
        if v.by == "config":
            return f"[{notes.setdefault(v.reason, len(notes) + 1)}]"
        return "works" if v.down == "once" else '`down="per_expert"`'

    def engine_cell(v: Verdict) -> str:
        return f"[{notes.setdefault(v.reason, len(notes) + 1)}]" if v.by == "engine" else "works"

    def table(axis: str, names, cell, keep) -> str:
        """A row an adapter and placement; a cell joins what the points of the other axis say."""
        said: dict[tuple, list[Verdict]] = {}
        for point, v in found.items():
            if keep(point, v):
                said.setdefault((point.placement, point.adapter, getattr(point, axis)), []).append(v)
        lines = [f"| placement, adapter | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
        for placement, adapter in itertools.product(PLACEMENTS, ADAPTERS):
            cells = []
            for name in names:
                here = said.get((placement, adapter, name), ())
                cells.append(", ".join(dict.fromkeys(map(cell, here))) or "-")
            lines.append(f"| {placement}, {adapter} | {' | '.join(cells)} |")
        return "\n".join(lines)

    configs = table("router", ("none", *ROUTERS), config_cell, lambda p, v: True)
    routes = lambda p: p.router != "none" or PLACEMENTS[p.placement].NEEDS  # noqa: E731
    engines = table("engine", ENGINES, engine_cell, lambda p, v: v.by != "config" and routes(p))
    works = sum(not v.by for v in found.values())
    reasons = "\n".join(f"{number}. {reason}" for reason, number in notes.items())
    return TEXT.format(works=works, points=len(found), configs=configs, engines=engines, reasons=reasons)


TEXT = """\
# Combinations

Which adapters, routers, placements and engines work together? Of {points} combinations {works} work. The others are
refused before anything compiles, and `[n]` in the tables points to the reason below. A combination is tried as one
rule with the members' own defaults; the router `none` means one expert without a router. Made by `python -m
launch.docs`.

The first table says what the config allows, whatever the engine. `down="per_expert"` means: it works if the rule says
so.

{configs}

The second table says which engines serve what the config allows, with any router (`base_experts` uses that of the
base). One expert without a router is stored whole on every device under all four engines.

{engines}

Reasons:

{reasons}
"""
