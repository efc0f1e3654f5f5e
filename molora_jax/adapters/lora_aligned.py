"""LoRA whose scale makes its first gradient that of full fine-tuning (GOAT, arXiv 2502.16894).

    delta_e(x) = s B_e A_e x,   s = sqrt(3 eta D_in / R)          eta: the ratio of the full to the LoRA learning rate

With B = 0 and A from U(+-1 / sqrt(D_in)), E[A^T A] = R / (3 D_in) I: the equivalent gradient s^2 R / (3 D_in) G is eta
G. So s differs from site to site (D_in is A's width), 1.7 to 7 times the usual alpha / R of 16: tune the rate anew,
the equivalent gradient grows with s^2. alpha is not read.
"""

import dataclasses
from typing import ClassVar

from molora_jax.adapters.lora import Lora


@dataclasses.dataclass(frozen=True)
class LoraAligned(Lora):
    """`rank` is an expert's."""

    eta: float = 1.0

    LIMITS: ClassVar = {"eta": (0, None, "()")}
    LOADS: ClassVar[bool] = False  # products of runs are of another scale at each site
    PAIRED: ClassVar[bool] = False  # so are the pairs that an optimizer moves together
    SUBTRACTS: ClassVar[bool] = True  # through Lora's

    def scale(self):
        """The part of s that all sites have; the root of D_in is with A."""
        return (3 * self.eta / self.rank) ** 0.5

    def scale_at(self, site):
        return self.scale() * site.d_in**0.5

    def factors(self, p, shared, ctx):
        found = super().factors(p, shared, ctx)
        return found.replace(A=found.A.shape[-1] ** 0.5 * found.A)
