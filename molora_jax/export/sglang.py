"""SGLang: peft's LoRA files; on a base's experts its three-dimensional form, in which the outer factors may be shared.

    ....mlp.experts.w1.lora_A.weight [1|E, R, D]      w1 gate, w3 up: A at the model's width
    ....mlp.experts.w1.lora_B.weight [1|E, F, R]
    ....mlp.experts.w2.lora_A.weight [1|E, R, F]      w2 down: B at the model's width
    ....mlp.experts.w2.lora_B.weight [1|E, D, R]

The first axis is 1 on the side that all experts share. With `factors="shared_outer"` that is A of w1 and w3 and B of
w2, the layout that it detects as shared-outer; a pair for all of them (`one`) is repeated, for it has no such layout.
Every scale is in B, all ranks are one. Its reader joins q, k and v of a layer and expects all three
(`normalize_qkv_proj`): those that a run does not adapt are pairs of zeros.
"""

import numpy as np

from molora_jax.export import peft_files, vllm
from molora_jax.export.base import Source
from molora_jax.export.peft_files import PREFIX

NAMES = {"gate": "w1", "up": "w3", "down": "w2"}


def write(source: Source, folder) -> list[str]:
    vllm.check(source)
    products, notes = with_qkv(source)
    ranks = [len(A) for A, _ in products.values()]
    ranks += [A.shape[1] for sites in source.expert_factors.values() for A, _ in sites.values()]
    rank = max(ranks)
    pad = lambda x: np.concatenate([x, np.zeros((len(x), rank - x.shape[1], x.shape[2]), np.float32)], axis=1)  # noqa: E731
    pairs = {name: tuple(pad(x[None])[0] for x in pair) for name, pair in products.items()}
    config, arrays = peft_files.lora(source, pairs, dict.fromkeys(pairs, 1.0))
    config |= {"r": rank, "lora_alpha": rank}
    for layer, sites in source.expert_factors.items():
        module = source.expert_module(layer, "gate", 0).rsplit(".", 2)[0]
        for site, (A, B) in sites.items():
            shared = len(A) == 1 and len(B) == 1
            A, B = (pad(np.repeat(x, source.backbone.experts, axis=0) if shared else x) for x in (A, B))
            key = f"{PREFIX}{module}.{NAMES[site]}"
            arrays |= {f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": np.swapaxes(B, 1, 2)}
    if source.expert_factors:
        config["target_modules"] = sorted({*config["target_modules"], "gate_proj", "up_proj", "down_proj"})
    peft_files.write_adapter(folder, source, config, arrays)
    return notes


def with_qkv(source: Source) -> tuple[dict, list[str]]:
    """`(products, notes)`: those of the run, and zeros (of rank 1) for what lacks beside one of q, k and v."""
    products, added = dict(source.products), set()
    for layer in range(source.backbone.layers):
        names = {site: source.place(layer, site)[0] for site in "qkv"}
        if len(set(names.values())) == 3 and any(name in source.products for name in names.values()):
            for site, name in names.items():
                if name not in products:
                    d_in, d_out = source.backbone.dims(site)
                    products[name] = np.zeros((1, d_in), np.float32), np.zeros((1, d_out), np.float32)
                    added.add(site)
    told = f"pairs of zeros for {', '.join(sorted(added))}: SGLang's reader expects q, k and v of a layer together"
    return products, [told] if added else []
