"""How is the weight change of expert e parameterised?"""

from molora_jax.adapters.dora import Dora
from molora_jax.adapters.lora import Lora
from molora_jax.adapters.lora_shared_a import LoraSharedA
from molora_jax.adapters.lora_xs import LoraXs
from molora_jax.adapters.mos import Mos
from molora_jax.adapters.rslora import RsLora

ADAPTERS = {"lora": Lora, "rslora": RsLora, "dora": Dora, "mos": Mos, "lora_xs": LoraXs, "lora_shared_a": LoraSharedA}
