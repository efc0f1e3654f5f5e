"""Load loss (Shazeer et al. 2017, arXiv 1701.06538, eq. 8 to 11): experts are likely to be chosen alike often.

    l = CV(sum_t P(x_t, .))^2,    P(x, i): the chance that noisy top-K chooses i (`routers/noisy_topk.py`)

A count of choices has no gradient; this smooth one has. P compares the raw logit with the K-th largest noisy one: a
comparison with thresholds of softmaxed values, as a well-known copy has it, is not this.
"""

import dataclasses
from typing import ClassVar

from molora_jax.losses.importance import Importance


@dataclasses.dataclass(frozen=True)
class Load(Importance):
    """As `importance`, over the routers that say P: `noisy_topk`."""

    ROUTERS: ClassVar[tuple[str, ...]] = ("noisy_topk",)

    def weighed(self, routing):
        return routing.reach
