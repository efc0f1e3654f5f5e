"""The families that are known by their `model_type`, a row each, and the shapes that have a name of their own.

A llama-like family is a row of `FAMILIES`: the switches of `Llama` that it sets, what transformers takes for a field
that its config.json lacks, and which fields it alone reads.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from molora_jax.backbones import bert, gemma, gpt_oss, mamba, moe
from molora_jax.backbones.bert import Bert
from molora_jax.backbones.hf_fields import shown
from molora_jax.backbones.llama import Llama
from molora_jax.backbones.mamba import Mamba
from molora_jax.backbones.moe import Moe
from molora_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Family:
    """A `model_type` of Hugging Face.

    `switches`: fields of the backbone beyond what config.json says; `defaults`: of fields that the file lacks;
    `before(config, where)`: the config that is meant, where a file says it in another way; `windowed`: its sliding
    window is read, `gated` if `use_sliding_window` has to say so, `every`: where `layer_types` does not say it, one of
    so many layers does not slide, or `slides(config, number, where)`: these do (without either all layers slide, and
    `layer_types` is not read); `activation`: the field that names it; `biased`: `attention_bias` is read, for q, k,
    v and o; `reads`: fields that it alone reads; `derived(config, number, where)`: fields of the backbone that follow
    from those; `whole`: the backbone's own reader of a config, in place of Llama's; `heads`: whether it has attention.
    """

    switches: dict = dataclasses.field(default_factory=dict)
    defaults: dict = dataclasses.field(default_factory=dict)
    before: Callable[[dict, str], dict] = lambda config, where: config
    windowed: bool = False
    gated: bool = True
    every: int = 0
    slides: Callable[..., tuple[int, ...]] | None = None
    activation: str = "hidden_act"
    biased: bool = False
    reads: tuple[str, ...] = ()
    derived: Callable[..., dict[str, Any]] = lambda config, number, where: {}
    backbone: type = Llama
    whole: Callable[..., Any] | None = None
    heads: bool = True


def _unrotated(config, number, where) -> dict:
    """SmolLM3: `no_rope_layers` has a 1 for each layer with positions; without it every so many have none."""
    layers, marks = number("num_hidden_layers"), config.get("no_rope_layers")
    if marks is None:
        every = number("no_rope_layer_interval", 4)
        marks = [int((i + 1) % every != 0) for i in range(layers)]
    if not isinstance(marks, list) or len(marks) < layers or any(type(m) is not int or m not in (0, 1) for m in marks):
        raise InputError(f"{where}: no_rope_layers", got=shown(marks), expected=f"a 0 or 1 for each of {layers} layers")
    return {"unrotated": tuple(i for i in range(layers) if not marks[i])}


def _from_max_window_layers(config, number, where) -> tuple[int, ...]:
    """Qwen2 and Qwen3: the layers below see everything; there may be none of them."""
    return tuple(range(_max_window_layers(config, where), number("num_hidden_layers")))


def _even_below_max_window_layers(config, number, where) -> tuple[int, ...]:
    """Qwen2-MoE: every second layer below."""
    return tuple(range(0, min(_max_window_layers(config, where), number("num_hidden_layers")), 2))


def _max_window_layers(config, where) -> int:
    first = config.get("max_window_layers")
    if type(first) is not int or first < 0:
        raise InputError(f"{where}: max_window_layers", got=shown(first), expected="0 or more")
    return first


_QWEN = dict(max_position_embeddings=32768, num_key_value_heads=32, sliding_window=4096, max_window_layers=28)
_GEMMA = dict(  # of Gemma 2 and 3
    hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8, num_key_value_heads=4,
    head_dim=256, hidden_activation="gelu_pytorch_tanh", query_pre_attn_scalar=256, sliding_window=4096,
    tie_word_embeddings=True,
)  # fmt: skip
_MOE = (
    "num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob",
    "mlp_only_layers", "decoder_sparse_step",
)  # fmt: skip
FAMILIES = {
    "llama": Family(defaults=dict(max_position_embeddings=2048), biased=True),
    "mistral": Family(
        defaults=dict(max_position_embeddings=131072, num_key_value_heads=8, sliding_window=4096),
        windowed=True, gated=False,
    ),
    "qwen2": Family(dict(qkv_bias=True), _QWEN, windowed=True, slides=_from_max_window_layers),
    "qwen3": Family(
        dict(qk_norm=True), _QWEN | dict(head_dim=128), windowed=True, slides=_from_max_window_layers, biased=True
    ),
    "smollm3": Family(
        defaults=dict(max_position_embeddings=32768, num_key_value_heads=4, rope_theta=2e6, tie_word_embeddings=True),
        windowed=True, slides=lambda *given: _unrotated(*given)["unrotated"], biased=True,
        reads=("no_rope_layers", "no_rope_layer_interval"), derived=_unrotated,
    ),
    "phi3": Family(  # Phi-3, 3.5, 4 and 4-mini; code of their own says what transformers' does
        dict(fused=True),
        dict(max_position_embeddings=4096, original_max_position_embeddings=4096, rms_norm_eps=1e-5),
        windowed=True, gated=False, reads=("partial_rotary_factor", "auto_map"),
    ),
    "olmo2": Family(
        dict(norms="post", qk_norm_all=True), dict(max_position_embeddings=2048, rms_norm_eps=1e-5), biased=True
    ),
    "gemma": Family(
        gemma.SWITCHES,
        dict(
            max_position_embeddings=8192, num_key_value_heads=16, head_dim=256, hidden_act="gelu_pytorch_tanh",
            tie_word_embeddings=True,
        ),
        biased=True, reads=("hidden_activation",), derived=gemma.first,
    ),
    "gemma2": Family(
        gemma.BOTH,
        _GEMMA | dict(max_position_embeddings=8192, attn_logit_softcapping=50.0, final_logit_softcapping=30.0),
        windowed=True, gated=False, every=2, activation="hidden_activation", biased=True,
        reads=(*_GEMMA, "attn_logit_softcapping", "final_logit_softcapping", "sliding_window_size"),
        derived=gemma.second,
    ),
    "gemma3_text": Family(
        gemma.BOTH | dict(qk_norm=True),
        _GEMMA | dict(max_position_embeddings=131072, rope_theta=1e6, rope_local_base_freq=1e4, vocab_size=262208),
        before=gemma.flat, windowed=True, gated=False, every=6, activation="hidden_activation", biased=True,
        reads=(
            *_GEMMA, "final_logit_softcapping", "rope_local_base_freq", "sliding_window_pattern",
            "_sliding_window_pattern",
        ),
        derived=gemma.third,
    ),
    "gemma3": Family(before=gemma.text_tower),
    "mixtral": Family(
        defaults=dict(
            max_position_embeddings=131072, num_key_value_heads=8, num_local_experts=8, num_experts_per_tok=2,
            rms_norm_eps=1e-5, rope_theta=1e6,
        ),
        windowed=True, gated=False, reads=(*_MOE, "router_jitter_noise"), derived=moe.fields, backbone=Moe,
    ),
    "olmoe": Family(
        dict(qk_norm_all=True),
        dict(
            max_position_embeddings=4096, num_experts=64, num_experts_per_tok=8, rms_norm_eps=1e-5,
        ),
        reads=_MOE, derived=moe.fields, backbone=Moe,
    ),
    "qwen2_moe": Family(
        defaults=dict(
            max_position_embeddings=32768, num_key_value_heads=16, sliding_window=4096, max_window_layers=28,
            num_experts=60, num_experts_per_tok=4, moe_intermediate_size=1408, shared_expert_intermediate_size=5632,
            intermediate_size=5632, qkv_bias=True,
        ),
        windowed=True, slides=_even_below_max_window_layers, derived=moe.fields, backbone=Moe,
        reads=(*_MOE, "shared_expert_intermediate_size", "qkv_bias"),
    ),
    "qwen3_moe": Family(
        dict(qk_norm=True),
        dict(
            max_position_embeddings=32768, num_key_value_heads=4, sliding_window=4096, max_window_layers=28,
            num_local_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, intermediate_size=6144,
        ),
        windowed=True, biased=True, reads=_MOE, derived=moe.fields, backbone=Moe,
    ),
    "gpt_oss": Family(
        defaults=dict(
            max_position_embeddings=131072, num_key_value_heads=8, head_dim=64, rms_norm_eps=1e-5, rope_theta=150000.0,
            num_local_experts=128, num_experts_per_tok=4, sliding_window=128, attention_bias=True,
        ),
        before=gpt_oss.before, windowed=True, gated=False, every=2, biased=True,
        reads=(
            *_MOE, "quantization_config", "swiglu_limit", "swiglu_alpha", "experts_per_token", "initial_context_length",
        ),
        derived=gpt_oss.fields, backbone=gpt_oss.GptOss,
    ),
    "bert": Family(
        reads=(
            "layer_norm_eps", "type_vocab_size", "position_embedding_type", "attention_probs_dropout_prob",
            "gradient_checkpointing",
        ),
        whole=bert.read,
    ),
    "mamba": Family(reads=mamba.READS, whole=mamba.read, heads=False),
    "falcon_mamba": Family(reads=mamba.READS, whole=mamba.read, heads=False),
}  # fmt: skip

TINY = Llama(
    family="llama", layers=4, width=64, ffn_width=128, heads=4, kv_heads=2, head_dim=16, vocab=320, context=512,
    rope_base=10000.0, norm_eps=1e-5, tied=True,
)  # fmt: skip
TINY_UNTIED = dataclasses.replace(TINY, tied=False)
TINY_QWEN3 = dataclasses.replace(TINY, family="qwen3", qk_norm=True, head_dim=32, norm_eps=1e-6)  # heads wider than D
TINY_MOE = Moe(
    family="mixtral", layers=4, width=64, ffn_width=32, heads=4, kv_heads=2, head_dim=16, vocab=320, context=512,
    rope_base=10000.0, norm_eps=1e-5, tied=True, experts=8, active=2, expert_width=32,
)  # fmt: skip
TINY_BERT = Bert(
    family="bert", layers=4, width=64, ffn_width=128, heads=4, vocab=320, context=512, token_types=2, norm_eps=1e-12
)
TINY_MAMBA = Mamba(
    family="mamba", layers=4, width=64, inner=128, state=8, rank=4, taps=4, vocab=320, context=512, norm_eps=1e-5,
    tied=True,
)  # fmt: skip
RANDOM = {  # of `base.source=random:NAME`
    "tiny": TINY, "tiny-untied": TINY_UNTIED, "tiny-qwen3": TINY_QWEN3, "tiny-bert": TINY_BERT, "tiny-moe": TINY_MOE,
    "tiny-mamba": TINY_MAMBA,
}  # fmt: skip
SMOLLM2 = Llama(  # the default base, for counts and costs that need no weights
    family="llama", layers=30, width=576, ffn_width=1536, heads=9, kv_heads=3, head_dim=64, vocab=49152, context=8192,
    rope_base=100000.0, norm_eps=1e-5, tied=True,
)  # fmt: skip
