"""The architectures of GGUF files, a row each: their tensors' names, and what their metadata say beyond llama's.

llama.cpp's converter changes some weights and leaves some numbers out; a row says how to undo the one and what the
other is.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from molora_jax.errors import InputError
from molora_jax.io.gguf import Gguf

LLAMA = {  # ours -> theirs; {i} is the layer
    "embed": "token_embd.weight",
    "final_norm": "output_norm.weight",
    "head": "output.weight",
    "attn_norm": "blk.{i}.attn_norm.weight",
    "ffn_norm": "blk.{i}.ffn_norm.weight",
    "attn_out_norm": "blk.{i}.post_attention_norm.weight",
    "ffn_out_norm": "blk.{i}.post_ffw_norm.weight",
    "q_norm": "blk.{i}.attn_q_norm.weight",
    "k_norm": "blk.{i}.attn_k_norm.weight",
    "q": "blk.{i}.attn_q",
    "k": "blk.{i}.attn_k",
    "v": "blk.{i}.attn_v",
    "o": "blk.{i}.attn_output",
    "gate": "blk.{i}.ffn_gate",
    "up": "blk.{i}.ffn_up",
    "down": "blk.{i}.ffn_down",
}
_QKV, _BOTH = "blk.{i}.attn_qkv", "blk.{i}.ffn_up"
PHI3 = LLAMA | dict(q=_QKV, k=_QKV, v=_QKV, gate=_BOTH, up=_BOTH)
GPT_OSS = LLAMA | {
    "ffn_norm": "blk.{i}.post_attention_norm.weight",
    "sinks": "blk.{i}.attn_sinks.weight",
    "router/kernel": "blk.{i}.ffn_gate_inp.weight",
    "router/bias": "blk.{i}.ffn_gate_inp.bias",
    **{f"experts/{site}": f"blk.{{i}}.ffn_{site}_exps.weight" for site in ("gate", "up", "down")},
    **{f"experts/{site}_bias": f"blk.{{i}}.ffn_{site}_exps.bias" for site in ("gate", "up", "down")},
}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """`family`: its `model_type`; `title`: of the class in transformers; `permuted`: rows of q and k are interleaved;
    `plus_one`: a norm's weight is stored with the 1 that the model adds; `split`: fused tensors of a Hugging Face
    folder are apart here; `sliding`: its window is read (readers agree which layers slide); `reads`: keys of its own;
    `config(gguf, arch, config)`: fields of `config.json` that follow from the metadata."""

    family: str
    title: str
    names: dict = dataclasses.field(default_factory=lambda: LLAMA)
    permuted: bool = False
    plus_one: bool = False
    split: bool = False
    sliding: bool = False
    reads: tuple[str, ...] = ()
    config: Callable[[Gguf, str, dict], dict[str, Any]] = lambda gguf, arch, config: {}


def meant(number):
    """1e-5 is stored in float32: the number that was meant."""
    return float(np.format_float_positional(np.float32(number), unique=True))


def _scalar(config: dict, layers_of_27b: int) -> int:
    """query_pre_attn_scalar, which no file says: the head size, in the 27B models D / H, as llama.cpp has it."""
    if config["num_hidden_layers"] == layers_of_27b:
        return config["hidden_size"] // config["num_attention_heads"]
    return config["head_dim"]


def _cap(gguf, arch, name):
    cap = gguf.metadata.get(f"{arch}.{name}")
    return None if cap is None else meant(gguf.get(f"{arch}.{name}", (int, float)))


def _gemma(gguf, arch, config):
    return {"hidden_act": "gelu_pytorch_tanh"}


def _gemma2(gguf, arch, config):
    return {
        "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": _scalar(config, 46),
        "attn_logit_softcapping": _cap(gguf, arch, "attn_logit_softcapping"),
        "final_logit_softcapping": _cap(gguf, arch, "final_logit_softcapping"),
    }  # fmt: skip


def _gemma3(gguf, arch, config):
    return {
        "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": _scalar(config, 62),
        "final_logit_softcapping": _cap(gguf, arch, "final_logit_softcapping"),
        "rope_theta": gguf.get(f"{arch}.rope.freq_base", (int, float), 1e6),
        "rope_local_base_freq": gguf.get(f"{arch}.rope.freq_base_swa", (int, float), 1e4),
    }  # fmt: skip


def _phi3(gguf, arch, config):
    """Rotation on a part of the head, and longrope's two lists, which are tensors."""
    out, original = {}, gguf.get(f"{arch}.rope.scaling.original_context_length", int, 4096)
    r = gguf.get(f"{arch}.rope.dimension_count", int, config["head_dim"])
    out |= {"partial_rotary_factor": r / config["head_dim"], "original_max_position_embeddings": original}
    lists = {f"{name}_factor": f"rope_factors_{name}.weight" for name in ("short", "long")}
    if all(name in gguf.entries for name in lists.values()):
        attention = meant(gguf.get(f"{arch}.rope.scaling.attn_factor", (int, float), 1.0))
        out["rope_scaling"] = {"rope_type": "longrope", "attention_factor": attention} | {
            key: [float(x) for x in gguf.tensor(name).reshape(-1)] for key, name in lists.items()
        }
    return out


def _gpt_oss(gguf, arch, config):
    kind = gguf.get(f"{arch}.rope.scaling.type", str, "yarn")
    if kind != "yarn":
        raise InputError(f"{gguf.path}: {arch}.rope.scaling.type", got=repr(kind)[:80], expected="yarn")
    real = lambda key, default: meant(gguf.get(f"{arch}.rope.scaling.{key}", (int, float), default))  # noqa: E731
    factor = real("factor", 32.0)
    scaling = {
        "rope_type": "yarn", "factor": factor, "beta_fast": real("yarn_beta_fast", 32.0),
        "beta_slow": real("yarn_beta_slow", 1.0), "truncate": False,
        "original_max_position_embeddings": gguf.get(f"{arch}.rope.scaling.original_context_length", int, 4096),
        "attention_factor": 0.1 * math.log(factor) + 1 if factor > 1 else 1.0,
    }  # fmt: skip
    return {
        "num_local_experts": gguf.get(f"{arch}.expert_count", int),
        "num_experts_per_tok": gguf.get(f"{arch}.expert_used_count", int),
        "intermediate_size": gguf.get(f"{arch}.expert_feed_forward_length", int, config["intermediate_size"]),
        "attention_bias": True, "rope_scaling": scaling,
    }  # fmt: skip


_CAPS = ("attn_logit_softcapping", "final_logit_softcapping")
ARCHITECTURES = {
    "llama": Architecture("llama", "Llama", permuted=True),
    "qwen2": Architecture("qwen2", "Qwen2"),
    "qwen3": Architecture("qwen3", "Qwen3"),
    "smollm3": Architecture("smollm3", "SmolLM3", permuted=True),  # no positions in every fourth layer, as the family
    "gemma": Architecture("gemma", "Gemma", plus_one=True, config=_gemma),
    "gemma2": Architecture("gemma2", "Gemma2", plus_one=True, sliding=True, reads=_CAPS, config=_gemma2),
    "gemma3": Architecture(
        "gemma3_text", "Gemma3", plus_one=True, sliding=True, reads=(_CAPS[1], "rope.freq_base_swa"), config=_gemma3
    ),
    "olmo2": Architecture("olmo2", "Olmo2"),
    "phi3": Architecture("phi3", "Phi3", PHI3, config=_phi3),
    "gpt-oss": Architecture(
        "gpt_oss", "GptOss", GPT_OSS, split=True, sliding=True,
        reads=("expert_count", "expert_used_count", "expert_feed_forward_length"), config=_gpt_oss,
    ),
}  # fmt: skip
