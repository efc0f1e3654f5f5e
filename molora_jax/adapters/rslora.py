"""rsLoRA (Kalajdzievski 2023, arXiv 2312.03732): LoRA with the scale alpha / sqrt(R), stable as R grows."""

import dataclasses

from molora_jax.adapters.lora import Lora


@dataclasses.dataclass(frozen=True)
class RsLora(Lora):
    def scale(self):
        return self.alpha / self.rank**0.5
