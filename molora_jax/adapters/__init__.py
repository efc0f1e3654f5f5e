"""How is the weight change of expert e parameterised?"""

from molora_jax.adapters.adalora import AdaLora
from molora_jax.adapters.allora import Allora
from molora_jax.adapters.dora import Dora
from molora_jax.adapters.dylora import DyLora
from molora_jax.adapters.lora import Lora
from molora_jax.adapters.mos import Mos
from molora_jax.adapters.rslora import RsLora

ADAPTERS = {
    "lora": Lora, "rslora": RsLora, "dora": Dora, "mos": Mos, "allora": Allora, "dylora": DyLora, "adalora": AdaLora,
}  # fmt: skip
