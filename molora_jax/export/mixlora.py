"""MixLoRA's own format, as the package `mixlora` (0.2.3) names it: `adapter_config.json`, `adapter_model.safetensors`.

    mixlora.layers.0.mlp.moe_gate.weight [E, D]
    mixlora.layers.0.mlp.gate_proj.experts.3.lora_A.weight [R, D_in], .lora_B.weight [D_out, R]      also up, down
    mixlora.layers.0.self_attn.q_proj.lora_A.weight ...                                             attention's LoRA
    of Phi-3: gate_up_proj and qkv_proj, whose B is block-diagonal

It holds experts that are whole feed-forward blocks in every layer, softmax and the top K renormalised, and plain LoRA
on attention. Its reader knows one rank and one alpha: ranks are padded, scales are in B. It reads `adapter_model.bin`,
a pickle, which is not written here: docs/export.md says the line that makes one.
"""

from molora_jax import placements
from molora_jax.config.fields import ATTENTION, FFN
from molora_jax.export import peft_files, vllm
from molora_jax.export.base import Source, in_rows, source_name, stacked
from molora_jax.io import tensors
from molora_jax.placements.ffn import FFN as FFNBlock
from molora_jax.routers.softmax_topk import SoftmaxTopK

ACTIVATIONS = {"gelu_tanh": "gelu_pytorch_tanh"}  # ours -> transformers', where they differ
NO_DROPOUT = 1e-9  # the package refuses 0, and its experts drop in inference too: no call of `eval()` reaches them
FAMILIES = ("llama", "mistral", "qwen2", "gemma", "gemma2", "phi3")  # of ours, that the package's forward pass has


def write(source: Source, folder) -> list[str]:
    rule = _check(source)
    found, router = {}, rule.router
    for other, layer, site, own in peft_files.own_leaves(source):
        name, part = source.place(layer, site.name)
        module, s = name.removeprefix("model."), other.adapter.scale()
        for e in range(site.experts):
            A, B = peft_files.pair(own, e)
            name = f"mixlora.{module}.experts.{e}" if other is rule else f"mixlora.{module}"
            found.setdefault(name, []).append((A, in_rows(s * B, part)))
    pairs = {name: stacked(some) for name, some in found.items()}
    arrays, rank = {}, 0
    for name, (A, B) in vllm.padded(pairs).items():
        arrays[f"{name}.lora_A.weight"], arrays[f"{name}.lora_B.weight"], rank = A, B.T, len(A)
    for layer in range(source.backbone.layers):
        own = source.by_site[rule.name, layer, f"router/{rule.router_scopes[0]}"]
        arrays[f"mixlora.layers.{layer}.mlp.moe_gate.weight"] = own["W"]
    sites = [site for other in source.rules for site in other.projections]
    weight = next((float(loss.weight) for name, loss in source.opened.model.losses if name == "balance"), 0.0)
    config = {
        "peft_type": "MIXLORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": source_name(source.opened),
        "bias": "none", "r": rank, "lora_alpha": rank, "lora_dropout": NO_DROPOUT,
        "target_modules": sorted({source.place(0, site)[0].rpartition(".")[2] for site in sites}),
        "routing_strategy": "mixlora", "num_experts": rule.experts[0], "top_k": router.k_max(rule.experts[0]),
        "router_aux_loss_coef": weight, "router_init_range": 0.02, "jitter_noise": 0.0, "router_loss": True,
        "act_fn": ACTIVATIONS.get(source.backbone.activation, source.backbone.activation),
    }  # fmt: skip
    peft_files.write_config(folder, config)
    tensors.write_named(folder / peft_files.WEIGHTS, arrays)
    return [f"jitter_noise is 0.0, not {router.jitter}: the package would add it in inference"] if router.jitter else []


def _check(source):
    source.check_alone()
    routed = [rule for rule in source.rules if rule.router is not None]
    named = ", ".join(rule.name for rule in routed) or "none"
    if len(routed) != 1 or not isinstance(placements.of(routed[0]), FFNBlock):
        raise source.refuse(f"whose routed rules are {named}", "one, whose experts are whole feed-forward blocks (ffn)")
    (rule,) = routed
    if len(set(rule.experts)) != 1:
        raise source.refuse(f"with {set(rule.experts)} experts by layer", "equally many in every layer")
    router = rule.router
    if type(router) is not SoftmaxTopK or not router.renormalise or rule.share == "model":
        raise source.refuse(f"whose router is {type(router).__name__}", "softmax_topk, renormalised, a layer's own")
    for other in source.rules:
        if not other.adapter.LOADS:
            raise source.refuse(f"whose rule {other.name} has {type(other.adapter).__name__}", "plain LoRA")
        if other is not rule and (not set(other.projections) <= set(ATTENTION) or set(other.experts) != {1}):
            raise source.refuse(f"whose rule {other.name} is on {','.join(other.sites)}", "attention in every layer")
    if source.backbone.family not in FAMILIES or not set(FFN) <= set(source.backbone.sites):
        raise source.refuse(f"on a base of the family {source.backbone.family}", f"one of {', '.join(FAMILIES)}")
    return rule
