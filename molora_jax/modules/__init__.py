"""Routed LoRA layers for a Flax model of one's own: thin skins over `placements` and `engines` (docs/library.md).

`RoutedLoRA` and `RoutedFFN` take the caller's kernels; `attach` puts them at the Dense layers of a finished model,
whose `params` stay as they are. `sown.py` makes losses, updates and statistics of what their routers decided, `nnx.py`
is the same for Flax NNX.

    adapters       factors and routers: what trains            router_state   what routers change without a gradient
    frozen         what an adapter never trains (PiSSA's start, MoS's tables); only where there is any
    routing        the decisions of one call, sown where it is mutable
"""

from molora_jax.modules.attach import attach, init_adapters, sites
from molora_jax.modules.ffn import RoutedFFN
from molora_jax.modules.lora import RoutedLoRA
from molora_jax.modules.sown import balance, routing_loss, routing_metrics, update_routers

__all__ = [
    "RoutedFFN", "RoutedLoRA", "attach", "balance", "init_adapters", "routing_loss", "routing_metrics", "sites",
    "update_routers",
]  # fmt: skip
