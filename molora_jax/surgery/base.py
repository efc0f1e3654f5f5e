"""The surgery contract: `check(parents)`, then `apply(parents) -> Result(config, leaves, ...)`.

A surgery is a frozen dataclass of its options, in a file of its own and with a row in `surgery.SURGERIES`. It is given
finished runs, opened and on one base, and says what the new run is: a config, and the leaves that fit it by
(rule, absolute layer, site, leaf), whatever the segments. Everything else (opening, writing, parents, identity) is
`perform.py`'s. Arrays are numpy; arithmetic is float64.
n parents, L layers, R rank, D_in and D_out widths of a site.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np

from molora_jax import config as config_lib
from molora_jax.errors import InputError
from molora_jax.io.base import Base
from molora_jax.runs.opened import Opened
from molora_jax.runs.products import products
from molora_jax.runs.view import Key, View


@dataclasses.dataclass(frozen=True)
class Parent:
    """A run that goes in. `name`: as it was given."""

    name: str
    opened: Opened

    config = property(lambda self: self.opened.config)
    model = property(lambda self: self.opened.model)

    def view(self, item: str = "adapters") -> View:
        return View(self.opened.items[item], where=f"{self.name}: {item}")

    @functools.cached_property
    def products(self) -> dict[tuple[str, int, str], tuple[np.ndarray, np.ndarray]]:
        """`{(rule, layer, site): (A [R, D_in], s B [R, D_out])}` of a run of plain adapters.

        Raises:
          InputError: a mixture, or an adapter that is no product.
        """
        return products(self.model, self.opened.items["adapters"], refuse=self.refuse)

    @functools.cached_property
    def _by_site(self) -> dict:
        return self.view().by_site()

    def leaves_at(self, rule: str, layer: int, site: str) -> tuple[dict, dict]:
        """`(own, shared)`: what an adapter's `factors` reads at a site."""
        return self._by_site.get((rule, layer, site), {}), self.opened.items["adapters"][rule].get("shared", {})

    def scale(self, rule: str) -> float:
        """`s` of a rule's adapter."""
        return next(one for one in self.model.rules if one.name == rule).adapter.scale()

    def refuse(self, got: str, expected: str, fix: str = "Choose another run.") -> InputError:
        return InputError("surgery.inputs", got=f"{self.name}, {got}", expected=expected, fix=fix)


@dataclasses.dataclass(frozen=True)
class Result:
    """The run that comes out.

    `leaves`: every leaf of `config`'s rules by key. `base`: a changed one, None for the parents' own. `state`: of the
    routers, likewise by key; `modules`: the nested dict of trained heads and copies.
    """

    config: Any
    leaves: Mapping[Key, np.ndarray]
    base: Base | None = None
    state: Mapping[Key, np.ndarray] = dataclasses.field(default_factory=dict)
    modules: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Surgery:
    """Literals: `PARENTS`, the fewest and most runs (None: any number)."""

    PARENTS: ClassVar[tuple] = (1, None)

    def check(self, parents: tuple[Parent, ...]) -> None:
        """Raises InputError for runs that this surgery cannot take, before anything is computed."""

    def apply(self, parents: tuple[Parent, ...]) -> Result:
        raise NotImplementedError


def same_sites(parents: tuple[Parent, ...], *, ranks: bool) -> None:
    """Raises InputError where the plain adapters of the parents do not cover the same rules, layers and sites, or
    (`ranks`) are of different ranks."""
    first = parents[0].products
    if not first:
        raise parents[0].refuse("without adapters", "a run of plain adapters")
    for parent in parents:
        other = parent.products
        for one, many, name in ((first, other, parent), (other, first, parents[0])):
            missing = sorted(one.keys() - many.keys())
            if missing:
                rule, layer, site = missing[0]
                raise name.refuse(f"without {site} of layer {layer} in a rule {rule}", "the same rules on all runs")
        for at, (A, _) in other.items() if ranks else ():
            if len(A) != len(first[at][0]):
                got = f"with rank {len(A)} at {at[2]} of layer {at[1]}, where {parents[0].name} has {len(first[at][0])}"
                raise parent.refuse(got, "one rank", "Take runs of one rank; lora_lego takes different ones.")
    if any(parent.opened.items.get("modules") for parent in parents):
        parent = next(parent for parent in parents if parent.opened.items.get("modules"))
        raise parent.refuse(
            "which trained a head or base leaves as well (objective, method.train_base)", "runs that are adapters alone"
        )


def ranks_of(parents: tuple[Parent, ...]) -> dict[str, list[list[int]]]:
    """`{rule: [ranks of a site over the parents, for each site]}`."""
    out: dict = {}
    for at in parents[0].products:
        out.setdefault(at[0], []).append([len(parent.products[at][0]) for parent in parents])
    return out


def merged_ranks(parents: tuple[Parent, ...], rank: int = 0) -> dict[str, int]:
    """`{rule: rank}` of what comes out: the one asked for, or (0) the largest of the parents."""
    return {rule: rank or max(map(max, every)) for rule, every in ranks_of(parents).items()}


def stacked(pairs: list, weights) -> tuple[np.ndarray, np.ndarray]:
    """`A [sum R_j, D_in]`, `B [sum R_j, D_out]` of `sum_j w_j s_j B_j A_j`, exactly; pairs as of `sites`."""
    A = np.concatenate([A for A, _ in pairs])
    return A, np.concatenate([wj * B for wj, (_, B) in zip(weights, pairs, strict=True)])


def plain_config(parents: tuple[Parent, ...], ranks: dict[str, int]):
    """The first parent's config with its rules as LoRA of these ranks and scale 1, checked against the base.

    Raises:
      InputError: a rank above what the base's widths allow.
    """
    config = parents[0].config.copy_and_resolve_references()
    with config.unlocked():
        for name, rank in ranks.items():
            rule = config.method.rules[name]
            rule.adapter = dict(
                name="lora", rank=int(rank), alpha=float(rank), dropout=rule.adapter.dropout, init="kaiming"
            )
    shape = parents[0].model.config
    config_lib.check_model(config, shape.layers, shape.dims, shape.ABSENT)
    return config


def sites(parents: tuple[Parent, ...]) -> Iterator[tuple[tuple, list]]:
    """`((rule, layer, site), [(A, s B) of each parent])` for all sites."""
    for at in parents[0].products:
        yield at, [parent.products[at] for parent in parents]


def pair(at: tuple, A: np.ndarray, B: np.ndarray) -> dict[Key, np.ndarray]:
    """The leaves of one site: `A [R, D_in]`, `B [R, D_out]` as its one expert's."""
    return {Key(*at, "A"): np.float32(A)[None], Key(*at, "B"): np.float32(B)[None]}


def weights_of(text: str, n: int, default: float) -> np.ndarray:
    """`[n]`: "" is the default for all, one number is for all, else a number a parent.

    Raises:
      InputError: another number of numbers, or what is none.
    """
    parts = [part.strip() for part in text.split(",")] if text.strip() else [str(default)]
    try:
        found = np.array([float(part) for part in parts])
    except ValueError:
        found = np.array([np.nan])
    if len(found) not in (1, n) or not np.isfinite(found).all():
        raise InputError(
            "surgery.weights", got=repr(text)[:80], expected=f"one number, or {n} by commas, one for each of the inputs"
        )
    return np.broadcast_to(found, (n,))
