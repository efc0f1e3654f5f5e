"""Config rules as values: which sites and layers a rule adapts, with how many experts, which adapter, which router.

`config` is the base's shape: `sites`, `dims(site) -> (D_in, D_out)` and `width`.
A segment is a run of layers on which every rule has the same expert count; the layer scan runs once a segment.
"""

import dataclasses
import functools
import re
import zlib
from typing import Any

from molora_jax.config.fields import ATTENTION, FFN, PROJECTIONS
from molora_jax.core.types import Site

SCOPES = ("attn", "ffn", "model", "block")


@dataclasses.dataclass(frozen=True)
class Rule:
    """`experts` holds a count a layer, 0 where the rule does not act; `router` is None for one expert without gates."""

    name: str
    sites: tuple[str, ...]
    experts: tuple[int, ...]
    adapter: Any
    router: Any = None
    down: str = "once"
    gates_scale_base: bool = False  # gates that do not sum to 1 scale the frozen FFN too (option `shrink`)
    load: tuple[str, ...] = ()  # of the runs and adapters that are the experts; see `runs/expert_runs.py`
    loaded: str = "frozen"  # what `load` filled: "frozen", or "trained", a start
    base_router: str = "frozen"  # of a base that routes itself: "frozen", or "trained", a copy of it
    placement: Any = None  # the placement, where the rule names one; else its sites say it (`placements.of`)

    @property
    def projections(self) -> tuple[str, ...]:
        """The names under which the rule's factors lie: the sites listed; of a whole FFN gate, up and down."""
        own = None if self.placement is None else self.placement.owned(self)
        if own is not None:
            return own
        return FFN if self.sites == ("ffn",) else self.sites

    @property
    def share(self) -> str:
        """Who shares a router ("": there is none). `site` on an FFN is the FFN; a chain's passes are its own."""
        if self.router is None:
            return ""
        if self.placement is not None and self.placement.scopes(self) is not None:
            return self.placement.NAME
        return "ffn" if self.sites == ("ffn",) and self.router.share == "site" else self.router.share

    @property
    def scopes(self) -> tuple[str, ...]:
        """The decisions of one layer, by the name under which they are stored and reported."""
        if self.router is None:
            return ()
        own = None if self.placement is None else self.placement.scopes(self)
        return own or ((self.share,) if self.share in SCOPES else self.sites)

    def leaves_of(self, scope: str) -> str:
        """The scope whose leaves and state a decision uses: its own, unless the placement says another."""
        return scope if self.placement is None else self.placement.leaves_of(scope)

    @property
    def router_scopes(self) -> tuple[str, ...]:
        """The scopes that own leaves."""
        return tuple(dict.fromkeys(map(self.leaves_of, self.scopes)))

    def decided_at(self, scope: str) -> tuple[str, ...]:
        """The sites whose factors a decision is for."""
        return self.projections if scope in SCOPES else (scope,)

    @property
    def tag(self) -> int:
        """Folded into random keys: a rule keeps its randomness whatever other rules there are."""
        return zlib.crc32(self.name.encode()) & 0x7FFFFFFF


@dataclasses.dataclass(frozen=True)
class Segment:
    """Layers `start` to `stop - 1`; `counts` gives the experts of every rule (0: the rule does not act here)."""

    start: int
    stop: int
    counts: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.start:03d}-{self.stop - 1:03d}"

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(range(self.start, self.stop))


ANY_SEGMENT = "???-???"  # the pattern of every segment's name in paths of leaves


def layers_named(segment: str) -> range | None:
    """The layers of a segment by its name, `"000-007"`; None where it is no such name."""
    bounds = re.fullmatch(r"(\d{1,6})-(\d{1,6})", segment)
    return None if bounds is None else range(int(bounds[1]), int(bounds[2]) + 1)


def segments(rules: tuple[Rule, ...], num_layers: int, cuts=()) -> tuple[Segment, ...]:
    """`cuts`: layers at which a segment ends whatever the rules say (the base's stacks)."""
    columns = [tuple(rule.experts[layer] for rule in rules) for layer in range(num_layers)]
    out, start = [], 0
    for layer in range(1, num_layers + 1):
        if layer == num_layers or layer in cuts or columns[layer] != columns[start]:
            out.append(Segment(start, layer, columns[start]))
            start = layer
    return tuple(out)


def site(config, name: str, segment: Segment, rule: Rule) -> Site:
    """A projection; or `attn`, `ffn`, `model`, `block`, `pass<t>`, which read a state of width D (in a chain, change it
    too); or another place whose factors the rule's placement owns."""
    d_in, d_out = config.dims(name) if name in PROJECTIONS else (config.width, config.width)
    experts = rule.experts[segment.start]
    if rule.placement is not None:
        d_in, d_out = rule.placement.dims(config, name) or (d_in, d_out)
        owned = name in rule.projections
        count = rule.placement.experts if owned else functools.partial(rule.placement.choices, rule)
        experts = count(config, experts)
    return Site(name, d_in, d_out, segment.layers, experts, rule.experts)


def router_site(config, scope: str, segment: Segment, rule: Rule) -> Site:
    """A router's scope; one with an INPUT of the model reads width D wherever it stands, one IN_RANK R."""
    found = site(config, scope, segment, rule)
    if rule.router.IN_RANK:
        return dataclasses.replace(found, d_in=rule.adapter.rank)
    return dataclasses.replace(found, d_in=config.width) if rule.router.INPUT else found


def adapter_sites(config, rule: Rule, segments: tuple[Segment, ...]) -> tuple[Site, ...]:
    """Every site whose factors the rule owns, segment by segment."""
    return tuple(site(config, name, s, rule) for s in segments if rule.experts[s.start] for name in rule.projections)


def site_tag(name: str) -> int:
    names = (*ATTENTION, *FFN, *SCOPES)  # numbers that random keys of older runs have
    if name in names:
        return names.index(name)
    passes = name.removeprefix("pass")
    return 20 + int(passes) if passes.isdigit() else zlib.crc32(name.encode()) & 0x7FFFFFFF
