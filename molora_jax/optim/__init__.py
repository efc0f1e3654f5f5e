"""How do the factors move?"""

from molora_jax.optim.adalora import AdaLoraOptimizer
from molora_jax.optim.adamw import AdamW
from molora_jax.optim.lora_plus import LoraPlus
from molora_jax.optim.lora_pro import LoraPro
from molora_jax.optim.sgd import Sgd

OPTIMIZERS = {"adalora": AdaLoraOptimizer, "adamw": AdamW, "lora_plus": LoraPlus, "lora_pro": LoraPro, "sgd": Sgd}
