"""The contract of a start: a function, or where it has options a frozen dataclass that is called alike.

    start(key, site, rank, *, scale, base, base_grad) -> {A, B[, A0, B0 | core]}     of one layer, float32

`A [1|E, R, D_in]`, `B [1|E, R, D_out]`; `scale` is the adapter's s. A function states the literals below at the top
level of its module, a dataclass as class variables.

    NEEDS   what it reads: "base", the site's frozen kernel `[D_in, D_out]`; "base_grad", the loss's gradient with
            respect to it, `[D_in, D_out]`, a mean over `batches`, a field that such a start has; another, `layers`,
            says for how many of them one pass gives it (`training.probe`)
    AWAY    B A is not 0 at the start: A0, B0 hold it, and the adapter takes it off
    CORE    it gives `core [E, R, R]`, a matrix between frozen A and B: a start of adapters that say CORE alone
    RANK    the largest rank: "larger" or "smaller" width of the site, or "half" of the smaller one
"""

import dataclasses
from typing import ClassVar

from molora_jax.core.types import Array, Site


@dataclasses.dataclass(frozen=True)
class Start:
    """Options are the fields: values of `adapter.init = dict(name=..., option=...)`."""

    NEEDS: ClassVar[tuple[str, ...]] = ()
    AWAY: ClassVar[bool] = False
    CORE: ClassVar[bool] = False
    RANK: ClassVar[str] = "larger"

    def __call__(
        self, key: Array, site: Site, rank: int, *, scale: float, base: Array | None = None,
        base_grad: Array | None = None,
    ) -> dict[str, Array]:  # fmt: skip
        raise NotImplementedError
