"""The placement contract: where in a block the experts of a rule act, and what they need there.

A placement is a frozen dataclass of its options, like every member, in a file of its own and with a row in
`placements.PLACEMENTS`. It knows no mesh and no engine. It gives

    literals     NAME, NAMED, SITES, OWNS, KINDS, LOADS, REFUSES, LIMITS: the config reads them without importing it
    of a rule    acts, scopes, choices, owned, dims, leaves_of, decided_by, slots, meetings, owns, widths, frozen, ends,
                 stays and the literals AXES, KEPT, DROPS, REDONE, IDS; asked by model, engines and table of bytes; each
                 has a default
    part(...)    one rule's experts at one meeting with tokens: a `Part`, which does the mathematics

and a place in the block: a `Region` that is there (`projection.Linear`, `ffn.Hidden`, `Beside`), or one of its own.
`engines.meet(on, region, arrays, parts)` brings a region's tokens and its parts together, whatever the engine:

    on one device, or where experts come to the tokens   region.start, part.here for each, region.close, region.end
    where tokens travel to their experts                 in place of part.here: part.sends -> part.there -> part.stay

Arrays that lie with the experts (factors, stacked kernels of the base) are fields of the part, those that lie with the
tokens or everywhere are the region's. All dimensions have logical names (`Axes`); the engine maps them to its mesh, and
specs, storage, padding, gathers and the table of bytes follow from that.
T tokens, K slots, E experts, R rank, D width. An example in one file: `tests/engines/toy_placement.py`.
"""

import dataclasses
from typing import ClassVar, NamedTuple

import jax

from molora_jax.core.quant import is_quantised
from molora_jax.core.types import Array, Factors


@dataclasses.dataclass(frozen=True)
class Axes:
    """What each dimension of an array is.

    `tokens`; `expert`; `frozen_expert`, of frozen kernels, which lie in shards under every engine; `rank`; `in`
    and `out`, the widths of the projection `site` (tensor parallelism splits one of them); `width`, D, which is never
    split; `sum` in front: partial sums over what splits the region, absent where nothing does. None is any other
    dimension.
    """

    names: tuple[str | None, ...] = ()
    site: str = ""


def of_kernel(W, axes: Axes):
    """`axes` of a frozen kernel; of a quantised one a tree of the same form: a scale stands where its codes do."""
    if not is_quantised(W):
        return axes

    def own(a):
        names = zip(a.shape[-len(axes.names) :], axes.names, strict=True)
        return Axes(tuple(None if n == 1 else name for n, name in names), axes.site)

    return W.map(own)


class At(NamedTuple):
    """`rows [T]`: the tokens' places in the global batch (for dropout). `shard (index, of)`: which shard of the inner
    width (see `Region.inner`) the arrays hold; outputs are then partial sums."""

    rows: Array
    shard: tuple


class Rows(NamedTuple):
    """What came to the experts: `x [M, D]` (or `[M, R]` where `rank`), `expert [M]` among those here (their number
    where the row is empty), `gates [M]`, `ids [M]` the places in the global batch where they were asked for."""

    x: Array
    expert: Array
    gates: Array
    ids: Array | None
    rank: bool


class Part:
    """One rule's experts at one meeting: a `flax.struct` dataclass of arrays, with at least

    `placement`, its placement; `experts`, E; `routed`, whether a router chose; `decision`, `(idx [T, K], gates [T, K])`
    where it did; and
    """

    def axes(self, rank_space: bool) -> "Part":
        """The same structure with `Axes` for arrays."""
        raise NotImplementedError

    def scales(self, x: Array) -> Array | None:
        """What is added to a frozen projection's input."""
        return None

    def early(self, x: Array, at: At):
        """What is formed from `x [T, D]` before the region, where tensor parallelism splits it; leads with T."""
        return None

    def here(self, arrays: dict, out, at: At, early=None):
        """`out` of the region and these experts' change of it. All experts and tokens are here."""
        raise NotImplementedError

    def sends(self, arrays: dict, at: At, rank_space: bool) -> Array:
        """A row a token, `[T, D]`, or a row a slot, `[T, K, R]`."""
        raise NotImplementedError

    def there(self, arrays: dict, rows: Rows, shard) -> Array:
        """What goes back, `[M, D_out]`, gate included; self holds the experts of one device."""
        raise NotImplementedError

    def stay(self, arrays: dict, out, back: Array, lost: Array):
        """`out` at home, with `back [T, D_out]`, the sum of a token's rows; `lost [T]`: gates of dropped slots."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Region:
    """A place in the block: which arrays enter, what is frozen in it, what comes out."""

    inner: ClassVar[Axes | None] = None  # the width that is summed over; None: tensor parallelism splits nothing here

    def axes(self) -> dict[str, Axes]:
        """Of every array that may enter; `x [T, ...]` does."""
        return {"x": Axes(("tokens", "width"))}

    def outs(self):
        """Of what comes out."""
        return Axes(("tokens", "width"))

    def enter(self, arrays: dict, parts, *, moved: bool, split: bool) -> dict:
        """Those of the arrays that are needed; `moved`: some tokens travel, `split`: by tensor parallelism."""
        return arrays

    def start(self, arrays: dict, parts, at: At):
        """`(arrays, out)`, before any expert."""
        return arrays, None

    def close(self, arrays: dict, out, parts: int):
        """After the last part: still partial sums."""
        return out

    def end(self, arrays: dict, out):
        """After the one sum over `tensor`."""
        return out


class Beside(Region):
    """Beside the feed-forward block: from its normed input `x [T, D]` to a change of its output."""


@dataclasses.dataclass(frozen=True)
class Placement:
    NAME: ClassVar[str] = ""
    NAMED: ClassVar[bool] = False  # a rule names it; else it is that of every rule with such sites and no name
    SITES: ClassVar[tuple[str, ...]] = (  # that a rule may list
        "q", "k", "v", "o", "gate", "up", "down", "in_proj", "x_proj", "dt_proj", "out_proj",
    )  # fmt: skip
    NEEDS: ClassVar[tuple[str, ...]] = ()  # what a base must have: "experts" of its own
    BASE_ROUTER: ClassVar[bool] = False  # a rule may train the base's own router
    OWNS: ClassVar[tuple[str, ...] | None] = None  # names under which a rule's factors lie; None: its sites
    KINDS: ClassVar[tuple[str, ...]] = ()  # kinds of its own that a rule may list in `adapters`; (): it lists none
    LOADS: ClassVar[bool] = True  # factors change a frozen weight, so they can be read from runs (a rule's `load`)
    # Rules that it cannot serve: (field, conditions, what is expected, what to change); see `config/limits.py`
    REFUSES: ClassVar[tuple] = ()
    AXES: ClassVar[dict] = {  # of `Factors`
        "A": ("expert", "rank", "in"), "B": ("expert", "rank", "out"), "mid": ("expert", "rank", "rank"),
        "out": ("expert", "out"), "inp": ("expert", "in"),
    }  # fmt: skip
    KEPT: ClassVar[tuple[str, ...]] = ()  # leaves that every device keeps with rank_space; (): there is no rank space
    DROPS: ClassVar[bool] = True  # an engine's capacity may drop its slots
    REDONE: ClassVar[tuple[str, ...]] = ()  # frozen projections that the experts form where they are
    IDS: ClassVar[int] = 1  # int32 numbers that travel with a row: its expert; 2: its place in the batch too

    def acts(self, rule) -> tuple[str, ...]:
        """Names at which a block asks for the rule: a projection, `ffn` (between up and down), `beside` (the FFN),
        `prompt` (before o)."""
        return rule.sites

    def experts(self, config, experts: int) -> int:
        """Experts that a rule's factors are for; `config` is the base's shape, `experts` what the rule says."""
        return experts

    def choices(self, rule, config, experts: int) -> int:
        """Experts among which one decision chooses; `experts` is what the rule says."""
        return self.experts(config, experts)

    def owned(self, rule) -> tuple[str, ...] | None:
        """Names under which the rule's factors lie, where they are not its sites."""
        return self.OWNS

    def dims(self, config, name: str) -> tuple[int, int] | None:
        """`(D_in, D_out)` of an owned place that is no projection, where they are not both D."""
        return None

    def kept(self, site: str, leaves: dict) -> dict:
        """Of a site's fresh leaves `[L, E, ...]` those that are kept (all, or one for experts that share)."""
        return leaves

    def scopes(self, rule) -> tuple[str, ...] | None:
        """The decisions of one layer, where they are not those that `router.share` says."""
        return None

    def leaves_of(self, scope: str) -> str:
        """The scope whose leaves and state a decision uses."""
        return scope

    def decided_by(self, scope: str) -> str:
        """The scope whose decision is taken over."""
        return scope

    def slots(self, rule, experts: int, config) -> int:
        """K, the most experts that a token meets; 0 where nobody chooses. `config` is the base's shape."""
        return 0 if rule.router is None else rule.router.k_max(experts)

    def meetings(self, rule) -> tuple[str, ...]:
        """Each time that a layer brings tokens and experts together, by the site or scope."""
        return self.acts(rule)

    def owns(self, rule, meeting: str) -> tuple[str, ...]:
        """Names of the factors that one meeting needs."""
        return (meeting,) if self.OWNS is None else self.OWNS

    def widths(self, config, meeting: str) -> tuple[tuple[int, str], tuple[int, str]]:
        """`(numbers, axis)` of a row that travels, there and back."""
        return (config.width, "width"), (config.width, "width")

    def frozen(self, config, meeting: str) -> int:
        """Numbers of the base's stacked kernels that a layer's meeting needs (all E experts)."""
        return 0

    def ends(self, rule, meeting: str) -> bool:
        """Whether nothing in a layer comes after the meeting, so that its output is not computed again."""
        return False

    def stays(self, factors) -> str | None:
        """Why experts with such factors (of shapes) cannot serve rows away from home; None where they can."""
        return "its experts are no products of rank R (adapter.form)" if factors.form is not None else None

    def axes(self, factors: Factors, site: str, rank_space: bool, experts: int = 0) -> Factors:
        """`factors` of so many experts (0: those of B) with `Axes` for arrays. What they share is on every device."""
        E, found = experts or factors.B.shape[0], {}
        for name, names in self.AXES.items():
            leaf = getattr(factors, name)
            if leaf is not None:
                whole = leaf.shape[0] != E or rank_space and name in self.KEPT
                found[name] = Axes((None, *names[1:]) if whole else names, site)
        return factors.replace(**found)

    def part(self, rule, site: str, p: dict, shared: dict, routing, context, x: Array) -> Part:
        """The rule's experts at `site`.

        Args:
          p: the layer's leaves by name of site; shared: the rule's; routing: the decision, None without a router.
          context: name of a site -> `Context`; x: `[T, D_in]`, for its shape.
        """
        raise NotImplementedError

    def parts(self, rule, site: str, p: dict, shared: dict, routing, context, x: Array) -> list[Part]:
        """The same as a list, of a placement that has several at one site."""
        return [self.part(rule, site, p, shared, routing, context, x)]

    def prompted(self, rule, p: dict, routing, q: Array, weights: dict, keys) -> Array:
        """What a placement that acts at `prompt` adds to attention's output before `o`, `[B, S, H * H_d]`.

        Args:
          q: the queries `[B, S, H, H_d]` as they meet the keys; weights: (kernel, bias) of the block's projections.
          keys: `[1, N, H_kv * H_d] -> [1, N, H_kv, H_d]`, what a family does to keys beside turning them.
        """
        raise NotImplementedError

    def beside(self, rule, p: dict, shared: dict, ctx, x: Array, decide, meet) -> Array:
        """The change of the block's output, `x [B, S, D]` -> `[B, S, D]`, of a placement that acts beside the FFN.

        Args:
          decide: `(t, z [B, S, D]) -> Routing | None` of the t-th of its scopes.
          meet: `(t, part, z [T, D]) -> [T, D]`, the part's change under the engine of the run.
        """
        raise NotImplementedError


def replicated(tree):
    """Axes of a small tree that every device holds (a dropout's key)."""
    return jax.tree.map(lambda _: Axes(), tree)
