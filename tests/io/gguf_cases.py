"""Tiny checkpoints as GGUF files, as llama.cpp's converter writes them: for the fixture of names and for the tests.

`CASES`: architecture -> config. The names come from the `gguf` package (`tests/fixtures/make_gguf_names.py`).
"""

import re

import numpy as np

from tests.backbones import family_cases
from tests.backbones.family_cases import config

CASES = {
    "smollm3": config("smollm3", num_hidden_layers=5),
    "gemma": config("gemma", head_dim=16, num_key_value_heads=1, hidden_act="gelu"),
    "gemma2": config("gemma2", num_hidden_layers=3, sliding_window=7, query_pre_attn_scalar=16),
    "gemma3": config(
        "gemma3_text", num_hidden_layers=7, sliding_window=7, query_pre_attn_scalar=16, sliding_window_pattern=...,
        rope_local_base_freq=1e4, rope_scaling=dict(rope_type="linear", factor=8.0),
    ),
    "olmo2": config("olmo2", tie_word_embeddings=False),
    "phi3": config("phi3", rope_scaling=family_cases._LONGROPE, original_max_position_embeddings=16,
                   partial_rotary_factor=0.5),
    "gpt-oss": family_cases.ROUTED["gpt_oss"],
}  # fmt: skip
_BLOCK = ("input_layernorm", "post_attention_layernorm", *(f"self_attn.{site}_proj" for site in "qkvo"))
_FFN = tuple(f"mlp.{site}_proj" for site in ("gate", "up", "down"))
_MORE = {  # modules of a layer beyond llama's, or in their place
    "gemma2": (*_BLOCK, *_FFN, "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    "gemma3": (*_BLOCK, *_FFN, "pre_feedforward_layernorm", "post_feedforward_layernorm", "self_attn.q_norm",
               "self_attn.k_norm"),
    "olmo2": (*_BLOCK[1:], *_FFN, "post_feedforward_layernorm", "self_attn.q_norm", "self_attn.k_norm"),
    "phi3": ("input_layernorm", "post_attention_layernorm", "self_attn.qkv_proj", "self_attn.o_proj",
             "mlp.gate_up_proj", "mlp.down_proj"),
    "gpt-oss": (*_BLOCK, "mlp.router", *(f"mlp.experts.{site}_proj" for site in ("gate", "up", "down"))),
}  # fmt: skip


def names(arch: str) -> list[str]:
    """Names of the tensors as the converter has them: gpt-oss' experts are split before they are named."""
    found = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    for module in _MORE.get(arch, (*_BLOCK, *_FFN)):
        found.append(f"model.layers.0.{module}.weight")
        if arch == "gpt-oss" and "norm" not in module:
            found.append(f"model.layers.0.{module}.bias")
    return found + (["model.layers.0.self_attn.sinks"] if arch == "gpt-oss" else [])


def tensors(arch: str, values: dict, c: dict, table: dict) -> dict:
    """GGUF name -> array: the converter's changes of the weights, under the names of the package's map."""
    out = {}
    for name, value in values.items():
        if name.endswith(("experts.gate_up_proj", "experts.gate_up_proj_bias")):
            stem, ending = name.removesuffix("gate_up_proj"), "weight"
            if name.endswith("_bias"):
                stem, ending = name.removesuffix("gate_up_proj_bias"), "bias"
            for site, half in (("gate", value[..., 0::2]), ("up", value[..., 1::2])):
                out[f"{stem}{site}_proj.{ending}"] = half.swapaxes(1, 2) if half.ndim == 3 else half
        elif name.endswith("experts.down_proj"):
            out[f"{name}.weight"] = value.swapaxes(1, 2)
        elif name.endswith("experts.down_proj_bias"):
            out[name.replace("_bias", ".bias")] = value
        elif "norm" in name and arch.startswith("gemma"):
            out[name] = value + 1
        elif arch == "smollm3" and re.search(r"[qk]_proj", name):
            heads = c["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            out[name] = value.reshape(heads, 2, -1, value.shape[-1]).swapaxes(1, 2).reshape(value.shape)
        else:
            out[name] = value

    def renamed(name):
        layer = re.search(r"layers\.(\d+)\.", name)
        found = table[arch][re.sub(r"layers\.\d+\.", "layers.0.", name)]
        return found.replace("blk.0.", f"blk.{layer[1]}.") if layer else found

    made = {renamed(name): np.ascontiguousarray(value, np.float32) for name, value in out.items()}
    if arch == "phi3":
        scaling = c["rope_scaling"]
        made |= {f"rope_factors_{n}.weight": np.array(scaling[f"{n}_factor"], np.float32) for n in ("long", "short")}
    return made


def metadata(arch: str, c: dict) -> dict:
    """What the converter writes of a config."""
    head_dim = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
    said = {
        "block_count": c["num_hidden_layers"], "context_length": c["max_position_embeddings"],
        "embedding_length": c["hidden_size"], "feed_forward_length": c["intermediate_size"],
        "attention.head_count": c["num_attention_heads"], "attention.head_count_kv": c["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": c["rms_norm_eps"],
    }  # fmt: skip
    if arch != "phi3":
        said |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    if arch not in ("gemma", "gemma2"):
        said["rope.freq_base"] = c["rope_theta"]
    if arch in ("gemma2", "gemma3", "gpt-oss"):
        said["attention.sliding_window"] = c["sliding_window"]
    if arch == "gemma2":
        said |= {name: c[name] for name in ("attn_logit_softcapping", "final_logit_softcapping")}
    if arch == "gemma3":
        said |= {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}
    if arch == "phi3":
        original = c["original_max_position_embeddings"]
        grown = np.log(c["max_position_embeddings"] / original) / np.log(original)
        said |= {
            "rope.dimension_count": int(head_dim * c["partial_rotary_factor"]),
            "rope.scaling.original_context_length": original, "rope.scaling.attn_factor": float((1 + grown) ** 0.5),
        }  # fmt: skip
    if arch == "gpt-oss":
        said |= {
            "expert_count": c["num_local_experts"], "expert_used_count": c["num_experts_per_tok"],
            "expert_feed_forward_length": c["intermediate_size"], "rope.scaling.type": "yarn",
            "rope.scaling.factor": c["rope_scaling"]["factor"],
            "rope.scaling.original_context_length": c["rope_scaling"]["original_max_position_embeddings"],
        }  # fmt: skip
    return {"general.architecture": arch} | {f"{arch}.{key}": value for key, value in said.items()}
