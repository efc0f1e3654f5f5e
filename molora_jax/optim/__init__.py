"""How do the factors move?"""

from molora_jax.optim.adamw import AdamW
from molora_jax.optim.lora_plus import LoraPlus

OPTIMIZERS = {"adamw": AdamW, "lora_plus": LoraPlus}
