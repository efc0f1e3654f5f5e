"""LoRA with one A for all experts of a layer:  delta_e(x) = (alpha / R) B_e A x.

E experts, R rank:  A [1, R, D_in],  B [E, R, D_out]. A x is formed once a token whatever its experts. With A frozen
(`schedule.s00.freeze="*/A"`) it is FFA-LoRA's factor under routing (configs/ffa_lora.py); trained, the asymmetric form
of HydraLoRA. One expert is plain LoRA.
"""

import dataclasses
from typing import ClassVar

from molora_jax.adapters.lora import Lora


@dataclasses.dataclass(frozen=True)
class LoraSharedA(Lora):
    LOADS: ClassVar[bool] = False  # runs have an A each

    def init_leaves(self, key, site, layer, *, base=None, base_grad=None):
        leaves = super().init_leaves(key, site, layer, base=base, base_grad=base_grad)
        return leaves | {"A": leaves["A"][:1]}
