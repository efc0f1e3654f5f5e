"""peft's XLORA: a rule of plain adapters that the router `x_lora` mixes, its head beside folders of LoRA experts.

    OUT/adapter_config.json, adapter_model.safetensors     the head; `adapters` names the folders by their whole path
    OUT/0, OUT/1, ...                                      an expert each, LORA

peft numbers its linears in the order of the model (q, k, v, o, gate, up, down of each layer) and has one slice of the
head's last layer for each: a slice that several of ours share is written for each of them.
"""

import numpy as np

from molora_jax import placements
from molora_jax.config.fields import PROJECTIONS
from molora_jax.export import peft_files
from molora_jax.placements.projection import Projection
from molora_jax.routers.x_lora import XLora

HEAD = "base_model.internal_xlora_classifier.layers."


def is_one(source) -> bool:
    return any(isinstance(rule.router, XLora) for rule in source.rules)


def write(source, folder) -> list[str]:
    source.check_alone()
    if len(source.rules) != 1:
        raise source.refuse("with rules beside that of x_lora", "one rule: peft's X-LoRA mixes all its adapters")
    (rule,) = source.rules
    adapter, router, counts = rule.adapter, rule.router, {n for n in rule.experts if n}
    if not isinstance(placements.of(rule), Projection) or len(counts) != 1:
        raise source.refuse("whose experts are no projections, equally many in all layers", "those")
    if not adapter.LOADS:
        raise source.refuse(f"whose experts are {type(adapter).__name__}", "plain LoRA experts")
    if not source.place(0, rule.projections[0])[0].startswith("model."):
        got = f"on a base of the family {source.backbone.family}"
        raise source.refuse(got, "a base whose modules are in `model`: peft's X-LoRA reads no other names")
    if router.mix == "softmax_topk" and router.top_k == 0:
        mix = {"enable_softmax": True, "enable_softmax_topk": False}
    else:
        mix = {"enable_softmax": router.mix == "softmax", "enable_softmax_topk": router.mix == "softmax_topk"}
    cool = router.temperature if router.mix == "softmax_topk" and router.top_k else 1.0  # peft's takes no temperature
    head, layerwise = _head(source, rule)
    last = max(int(name.split(".")[0]) for name in head)
    head = {name: x / cool if name.startswith(f"{last}.") else x for name, x in head.items()}
    experts = counts.pop()
    config = {
        "peft_type": "XLORA", "hidden_size": source.backbone.width, "layerwise_scalings": layerwise,
        "adapters": {str(e): str(source.out / str(e)) for e in range(experts)}, "xlora_depth": router.depth,
        "xlora_size": router.width, "xlora_dropout_p": router.dropout, "scaling_pass_value": 0.0,
        "softmax_temperature": 1.0 if router.mix == "raw" else router.temperature,
        "global_scaling_weight": router.gain, "top_k_lora": router.top_k or None, "use_trainable_adapters": False,
        **mix,
    }  # fmt: skip
    for e in range(experts):
        own = folder / str(e)
        own.mkdir()
        peft_files.write_adapter(own, source, *_expert(source, rule, e))
    peft_files.write_adapter(folder, source, config, {f"{HEAD}{name}": x for name, x in head.items()})
    return [f"adapter_config.json names the experts by their place, {source.out}: change `adapters` where they move"]


def _expert(source, rule, e: int):
    pairs = {source.module(layer, site.name): peft_files.pair(own, e) for _, layer, site, own in
             peft_files.own_leaves(source)}  # fmt: skip
    return peft_files.lora(source, pairs, dict.fromkeys(pairs, rule.adapter.scale()))


def _head(source, rule) -> tuple[dict, bool]:
    """`({"0.weight": ..., "0.bias": ...}, layerwise)`: the places of a Sequential with ReLU and dropout between."""
    router, shared = rule.router, source.shared(rule)
    step = 3 if router.dropout > 0 else 2  # linear, ReLU(, dropout)
    trunk = shared.get("trunk", {})
    layers = {f"{step * int(i)}": leaves for i, leaves in trunk.items()}
    if rule.share == "model":
        own, layerwise = shared["router"]["model"], False
        last = {name: x[0] for name, x in own.items()}
    else:
        layerwise, slices = True, []
        for layer, n in enumerate(rule.experts):
            for site in [s for s in PROJECTIONS if n and s in rule.projections]:
                scope = site if rule.share == "site" else rule.share
                slices.append(source.by_site[rule.name, layer, f"router/{scope}"])
        last = {name: np.concatenate([own[name] for own in slices]) for name in slices[0]}
    layers[str(step * len(trunk))] = last | ({} if "b" in last else {"b": np.zeros(len(last["W"]), np.float32)})
    names = {"W": "weight", "b": "bias"}
    return {f"{i}.{names[name]}": x for i, own in layers.items() for name, x in own.items()}, layerwise
