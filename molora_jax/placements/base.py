"""The placement contract: where in a block the experts of a rule act, and what they need there.

A placement is a frozen dataclass of its options, like every member. It knows no mesh. What the config has to know
stands as literals in its file, which are read without importing it (`config/members.py`): NAMED, SITES, OWNS, LOADS,
REFUSES, and the types and LIMITS of its options.
"""

import dataclasses
from typing import ClassVar


@dataclasses.dataclass(frozen=True)
class Placement:
    NAME: ClassVar[str] = ""
    NAMED: ClassVar[bool] = False  # a rule names it; else it is that of every rule with such sites and no name
    SITES: ClassVar[tuple[str, ...]] = ("q", "k", "v", "o", "gate", "up", "down")  # that a rule may list
    OWNS: ClassVar[tuple[str, ...] | None] = None  # names under which a rule's factors lie; None: its sites
    LOADS: ClassVar[bool] = True  # factors change a frozen weight, so they can be read from runs (a rule's `load`)
    # Rules that it cannot serve: (field, conditions, what is expected, what to change); see `config/limits.py`
    REFUSES: ClassVar[tuple] = ()
    KEPT: ClassVar[tuple[str, ...]] = ()  # leaves that every device keeps with rank_space; (): there is no rank space
    REDONE: ClassVar[tuple[str, ...]] = ()  # frozen projections that the experts form where they are
    IDS: ClassVar[int] = 1  # int32 numbers that travel with a row: its expert, and its place in the batch for a dropout

    def acts(self, rule) -> tuple[str, ...]:
        """Names at which a block asks for the rule: a projection, `ffn` (between up and down), `beside` (the FFN)."""
        return rule.sites

    def scopes(self, rule) -> tuple[str, ...] | None:
        """The decisions of one layer, where they are not those that `router.share` says."""
        return None

    def leaves_of(self, scope: str) -> str:
        """The scope whose leaves and state a decision uses."""
        return scope

    def meetings(self, rule) -> tuple[str, ...]:
        """How often a layer brings tokens and experts together: the site or scope of each time."""
        return self.acts(rule)

    def owns(self, rule, meeting: str) -> tuple[str, ...]:
        """Names of the factors that one meeting needs."""
        return (meeting,) if self.OWNS is None else self.OWNS

    def ends(self, rule, meeting: str) -> bool:
        """Whether nothing in a layer comes after the meeting, so that its output is not computed again."""
        return meeting == "down"

    def stays(self, factors) -> str | None:
        """Why experts with such factors (of shapes) cannot serve rows away from home; None where they can."""
        return None
