"""How is the weight change of expert e parameterised?"""

from molora_jax.adapters.adalora import AdaLora
from molora_jax.adapters.allora import Allora
from molora_jax.adapters.comol import Comol
from molora_jax.adapters.dora import Dora
from molora_jax.adapters.dylora import DyLora
from molora_jax.adapters.ia3 import Ia3
from molora_jax.adapters.lora import Lora
from molora_jax.adapters.lora_aligned import LoraAligned
from molora_jax.adapters.lora_fa import LoraFA
from molora_jax.adapters.lora_shared_a import LoraSharedA
from molora_jax.adapters.lora_sparse_a import LoraSparseA
from molora_jax.adapters.lora_xs import LoraXs
from molora_jax.adapters.mos import Mos
from molora_jax.adapters.nola import Nola
from molora_jax.adapters.randlora import RandLora
from molora_jax.adapters.rslora import RsLora
from molora_jax.adapters.vera import Vera

ADAPTERS = {
    "lora": Lora,
    "rslora": RsLora,
    "dora": Dora,
    "mos": Mos,
    "lora_fa": LoraFA,
    "vera": Vera,
    "ia3": Ia3,
    "nola": Nola,
    "randlora": RandLora,
    "allora": Allora,
    "dylora": DyLora,
    "adalora": AdaLora,
    "lora_xs": LoraXs,
    "lora_shared_a": LoraSharedA,
    "lora_aligned": LoraAligned,
    "comol": Comol,
    "lora_sparse_a": LoraSparseA,
}
