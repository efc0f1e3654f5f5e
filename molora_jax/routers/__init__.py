"""Which experts does a token use, with what weight?"""

from molora_jax.routers.softmax_topk import SoftmaxTopK
from molora_jax.routers.top_p import TopP
from molora_jax.routers.x_lora import XLora

ROUTERS = {"softmax_topk": SoftmaxTopK, "top_p": TopP, "x_lora": XLora}
