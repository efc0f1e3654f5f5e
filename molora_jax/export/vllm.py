"""vLLM: peft's LoRA files, with a pair of matrices a projection and, on a base's experts, a pair for each of them.

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight [R, D_in], .lora_B.weight [D_out, R]
    base_model.model.model.layers.0.mlp.experts.3.gate_proj.lora_A.weight ...        (Mixtral: w1, w2, w3)

Every scale is in B and all ranks are one (the largest, by rows of zeros): its reader takes `lora_alpha / r` for all
modules and no pattern. It has no DoRA and no router, and no adapters on state-space blocks (its class of Mamba lacks
`SupportsLoRA`). A module that is several sites (Phi-3's qkv_proj) is one there too.
"""

import numpy as np

from molora_jax.config.fields import FFN, SSM
from molora_jax.export import peft_files
from molora_jax.export.base import Source


def write(source: Source, folder) -> list[str]:
    check(source)
    pairs = dict(source.products)
    for layer, sites in source.expert_factors.items():
        for site in FFN:
            for e in range(source.backbone.experts):
                A, B = (x[e if len(x) > 1 else 0] for x in sites[site])
                pairs[source.expert_module(layer, site, e)] = A, B
    pairs = padded(pairs)
    peft_files.write_adapter(folder, source, *peft_files.lora(source, pairs, dict.fromkeys(pairs, 1.0)))
    return []


def check(source: Source) -> None:
    """Raises InputError for a run that a server's LoRA cannot be."""
    source.check_static(experts=True)
    if set(SSM) & set(source.backbone.sites):
        raise source.refuse(
            f"on a base of the family {source.backbone.family}", "a base with attention: the server adapts no other",
            "--format=merged is a model that it serves.",
        )  # fmt: skip


def padded(pairs: dict) -> dict:
    """All of the largest rank, by rows of zeros: the products are the same."""
    rank = max(len(A) for A, _ in pairs.values())
    pad = lambda x: np.concatenate([x, np.zeros((rank - len(x), x.shape[1]), np.float32)])  # noqa: E731
    return {name: (pad(A), pad(B)) for name, (A, B) in pairs.items()}
