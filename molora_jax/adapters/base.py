"""The adapter contract. An adapter is a frozen dataclass of its config; this base gives the parts that most share.

`init_leaves(key, site, layer, *, base, base_grad)` makes one layer's leaves, `init_shared(key, sites)` those that all
layers of the rule share, `factors(p, shared, ctx)` says how the experts change the site's projection.
"""

import dataclasses
from typing import ClassVar

from molora_jax import inits
from molora_jax.config import outside
from molora_jax.core.types import Array, Context, Factors, Site
from molora_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Adapter:
    """Fields that every adapter has. `dropout` acts on the adapter's input: one mask a site call for all experts.

    `init`: a start's name, or `dict(name=..., options)`, of which the field then holds the `Start`.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.05
    init: str = "kaiming"

    LIMITS: ClassVar = {"rank": (1, None), "alpha": (0, None, "()"), "dropout": (0, 1, "[)")}
    FROZEN: ClassVar[tuple[str, ...]] = ("A0", "B0")  # leaf names that never train (the start of PiSSA)
    # Whether `factors` takes off the start A0, B0 of an init that says AWAY; of the class that writes `factors` itself.
    SUBTRACTS: ClassVar[bool] = False
    PAIRED: ClassVar[bool] = True  # whether its leaves A and B add s B A, so that an optimizer may move them together
    # Whether it has a core between frozen A and B, so that its start is one that says CORE; likewise.
    CORE: ClassVar[bool] = False
    LOADS: ClassVar[bool] = False  # whether its leaves are A and B of a product alone, to be filled from a run
    DENSE: ClassVar[bool] = False  # whether its inner width is near the widths of a site: there is no rank to stay in
    RANK_BOUND: ClassVar[bool] = True  # whether a rank above both widths of a site is a mistake
    ROW_FACTORS: ClassVar[bool] = False  # whether it has `Factors.out` or `inp`, which multiply the frozen product
    AFTER_DOWN: ClassVar[bool] = True  # whether one of them multiplies what W_d (the down projection) gives

    def __post_init__(self):
        if hasattr(self.init, "items"):  # a config holds a dict; a member is hashed
            object.__setattr__(self, "init", inits.made(self.init))

    @property
    def start(self):
        """Where its factors start: a function or a `Start` (`inits/base.py`)."""
        return inits.made(self.init)

    def scale(self) -> float:
        """`s` of `s B A x`; leaves are stored unscaled."""
        return self.alpha / self.rank

    def scale_at(self, site: Site) -> float:
        """The whole factor of B A at a site, of which `factors` may put a part into A: what a start reads."""
        return self.scale()

    def check(self, where: str, sites: tuple[Site, ...]) -> None:
        """Raises InputError where this model's widths or layers do not fit; `where` is the field of the config."""

    def init_leaves(
        self, key: Array, site: Site, layer: Array, *, base: Array | None = None, base_grad: Array | None = None
    ) -> dict[str, Array]:
        leaves = self.start(key, site, self.rank, scale=self.scale_at(site), base=base, base_grad=base_grad)
        if "A0" in leaves and not outside.stated_with(type(self), "SUBTRACTS", "factors"):
            raise InputError(
                "adapter.init", got=f"{self.init!r}, whose start is not zero",
                expected=f"a start that is: {type(self).__name__}.factors says no SUBTRACTS", fix="Use kaiming.",
            )  # fmt: skip
        return leaves

    def init_shared(self, key: Array, sites: tuple[Site, ...]) -> dict[str, Array]:
        return {}

    def factors(self, p: dict, shared: dict, ctx: Context) -> Factors:
        raise NotImplementedError

    def latent(self, z: Array, p: dict, ctx: Context) -> Array:
        """Changes the rank activations `z [T, 1|E, R]` before the gates; the identity here."""
        return z

    def same_bases(self, leaves: dict) -> bool:
        """Whether bases that are made from a seed are those that these leaves (numpy) were trained with."""
        return True

    def update_mask(self, updates: dict, step: Array, step_key: Array) -> dict:
        """Changes the rule's updates (stacked tree) after the optimizer and its decay; the identity here.

        `step` is the number of updates before this one, `step_key` what `Context` has under that name in its forward
        pass: a choice that a step makes at random is drawn again.
        """
        return updates
