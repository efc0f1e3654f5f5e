"""What a row of the catalogue says of a method or of a surgery.

A row is a config (with overrides where a method is one option away from another), the paper, the equation, what the
method has of its own on the axes, where it departs from the paper's code, and the paper's count of trained parameters
as a function of the decoder's shape.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from molora_jax.backbones.base import Backbone


@dataclasses.dataclass(frozen=True)
class Method:
    """One method of the literature.

    `params(decoder)` is the paper's number of trained parameters; `own` the files under `molora_jax/` that are there
    for it; `zero_init` says that the start changes nothing; `exceptions` are path patterns of leaves that get no
    gradient at random factors, by the method's own design.
    """

    config: str
    title: str
    paper: str  # arXiv id; "" for a method of your own
    axes: str  # what is its own, by axis
    equation: str
    params: Callable[[Backbone], int]
    differs: str = ""
    own: tuple[str, ...] = ()
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)  # dotted field of the config -> value
    zero_init: bool = True
    exceptions: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Operation:
    """A surgery: runs in, one run out. `takes`: which runs; `differs`: from the paper or its public code."""

    config: str
    title: str
    paper: str  # arXiv id; "" for none
    equation: str
    takes: str
    differs: str = ""
