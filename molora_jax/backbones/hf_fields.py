"""Every field of a Hugging Face `config.json`: which are read, which may be there, and which are refused.

A field that changes the numbers and is not implemented must not be dropped in silence. So the whole config is gone
through: READ by `hf_config.from_hf`; MATTER, which is refused by name unless its value says "off"; HARMLESS. What is on
no list is refused where its name sounds like arithmetic (`SOUNDS`) and is set; otherwise it is left to a printed note:
configs carry marks of many tools, and a model must not be lost to each new one.
"""

import math
import re

from molora_jax.errors import InputError

READ = frozenset(
    "model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "head_dim hidden_act max_position_embeddings rms_norm_eps tie_word_embeddings rope_theta rope_scaling "
    "rope_parameters original_max_position_embeddings sliding_window use_sliding_window max_window_layers layer_types "
    "attention_bias mlp_bias".split()
)

HARMLESS = frozenset(
    "architectures torch_dtype dtype transformers_version use_cache cache_implementation initializer_range "
    "pad_token_id bos_token_id eos_token_id unk_token_id sep_token_id cls_token_id mask_token_id "
    "decoder_start_token_id forced_bos_token_id forced_eos_token_id suppress_tokens begin_suppress_tokens "
    "bad_words_ids attention_dropout hidden_dropout embd_pdrop resid_pdrop attn_pdrop hidden_dropout_prob "
    "classifier_dropout pretraining_tp _name_or_path name_or_path torchscript tf_legacy_loss use_bfloat16 "
    "is_decoder output_attentions output_hidden_states return_dict return_dict_in_generate id2label label2id "
    "num_labels problem_type task_specific_params finetuning_task tokenizer_class prefix chunk_size_feed_forward "
    "pruned_heads _attn_implementation _attn_implementation_autoset attn_implementation _flash_attn_2_enabled "
    "use_flash_attn use_flash_attention use_flash_attention_2 _commit_hash unsloth_fixed unsloth_version "
    "model_max_length max_sequence_length max_length min_length do_sample temperature top_p top_k num_beams "
    "repetition_penalty length_penalty no_repeat_ngram_size early_stopping router_aux_loss_coef "
    "output_router_logits aux_loss_alpha seq_length training_args license language tags keys_to_ignore_at_inference "
    "z_loss_coefficient is_llama_config transformers.js_config dual_chunk_attention_config".split()
)

_HEAD = object()  # the head size
_SCALE = object()  # one over its root
_WIDTH = object()  # hidden_size
MATTER = {  # field -> values that say "off"; null, false and empty always do
    "partial_rotary_factor": (1,), "rotary_pct": (1,), "rotary_percentage": (1,), "rotary_dim": (_HEAD,),
    "rope_dim": (_HEAD,), "qk_rope_head_dim": (_HEAD,), "rope_ratio": (1,), "rope_interleaved": (),
    "rope_interleave": (), "use_rope": (True,), "no_rope_layers": (), "no_rope_layer_interval": (0,),
    "nope_layer_interval": (0,), "alibi": (), "position_embedding_type": ("rope", "rotary", "absolute", "default"),
    "attn_logit_softcapping": (0,), "final_logit_softcapping": (0,), "logit_softcapping": (0,), "clip_qkv": (0,),
    "query_pre_attn_scalar": (_HEAD,), "attention_multiplier": (_SCALE,), "softmax_scale": (_SCALE,),
    "embedding_multiplier": (1,), "residual_multiplier": (1,), "logits_scaling": (1,), "logit_scale": (1,),
    "output_multiplier": (1,), "scale_emb": (1,), "scale_depth": (), "dim_model_base": (_HEAD,),
    "scale_attn_weights": (True,),
    "attn_temperature_tuning": (0,), "attention_chunk_size": (0,), "attention_type": ("full", "full_attention"),
    "attention_window_size": (0,), "sliding_window_pattern": (0, 1), "window_size": (0,),
    "qk_norm": (), "use_qk_norm": (), "qk_layernorm": (), "use_qk_layernorm": (), "norm_after_attention": (),
    "norm_type": ("rms", "rmsnorm", "RMSNorm", "rms_norm"), "use_parallel_residual": (),
    "parallel_attn": (), "hidden_activation": (), "mlp_type": ("swiglu", "gated"), "bias": (), "qkv_bias": (),
    "use_bias": (), "attention_out_bias": (), "lm_head_bias": (), "head_bias": (), "o_bias": (),
    "num_experts": (0, 1), "num_local_experts": (0, 1), "n_routed_experts": (0,), "num_experts_per_tok": (0,),
    "moe_intermediate_size": (0,), "quantization_config": (), "quantization": (), "compression_config": (),
    "sparsity_config": (), "is_encoder_decoder": (), "is_causal": (True,), "use_bidirectional_attention": (),
    "add_cross_attention": (), "cross_attention_hidden_size": (), "tie_encoder_decoder": (), "vision_config": (),
    "audio_config": (), "text_config": (), "num_nextn_predict_layers": (0,), "attention_sink": (), "use_mup": (),
    "value_head_dim": (_HEAD,), "v_head_dim": (_HEAD,), "kv_lora_rank": (0,), "q_lora_rank": (0,),
    "embedding_size": (_WIDTH,), "word_embed_proj_dim": (_WIDTH,), "layer_idx_scale": (), "mup_base_width": (),
}  # fmt: skip

SOUNDS = re.compile(
    r"rope|rotary|alibi|softcap|multiplier|scal(e|ing)|sliding|window|expert|moe_|bias|_norm\b|qk_|quant|spars|clip|mup|"
    r"head_dim|parallel_(attn|residual)|attention_(type|pattern|factor|chunk)|layer_(types?|pattern)|lora"
)


def is_off(value) -> bool:
    """Null, false and empty containers and texts say that a feature is not used."""
    return value is None or value is False or (isinstance(value, (str, list, dict)) and not value)


def check(config: dict, *, where: str, head_dim: int, reads: tuple[str, ...] = ()) -> list[str]:
    """The names of fields that nobody knows, to be reported. `reads`: fields that the model's family alone reads.

    Raises:
      InputError: a field that changes the numbers in a way that the decoder does not have.
    """
    unknown = []
    for name, value in config.items():
        on = any(off is True for off in MATTER.get(name, ()))  # fields whose usual value is true
        if name in READ or name in reads or name in HARMLESS or (is_off(value) and not (on and value is False)):
            continue
        if name == "auto_map":
            _custom_code(value, where)
            continue
        if name == "no_rope_layers" and isinstance(value, list) and all(type(v) is int and v == 1 for v in value):
            continue  # SmolLM3's and Llama 4's way to say that every layer has positions
        scale = value if _is_scale(value, head_dim) else None
        own = {_HEAD: head_dim, _SCALE: scale, _WIDTH: config.get("hidden_size")}
        neutral = [own.get(off, off) for off in MATTER.get(name, ())]
        if any(type(value) is type(off) and value == off for off in neutral) or (
            type(value) in (int, float) and any(type(off) is int and value == off for off in neutral)
        ):
            continue
        sounds = SOUNDS.search(name) and not (type(value) in (int, float) and value in (0, 1))
        if name in MATTER or sounds:
            raise InputError(
                f"{where}: {shown(name)}", got=shown(value), expected="a model without it: it changes the numbers",
                fix="Choose a plain model of a supported family; or, if you know that it does nothing in this one, "
                "remove the field from config.json.",
            )  # fmt: skip
        unknown.append(name)
    return unknown


def _is_scale(value, head_dim) -> bool:
    return type(value) is float and math.isclose(value, head_dim**-0.5, rel_tol=1e-6)


def _custom_code(value, where):
    models = [name for name in value if name.startswith("AutoModel")] if isinstance(value, dict) else []
    if models:
        raise InputError(
            f"{where}: auto_map", got=", ".join(shown(name) for name in models[:4]),
            expected="a model without code of its own", fix="If its weights are those of a plain model of its "
            "model_type, remove auto_map from config.json.",
        )  # fmt: skip


def quoted(value) -> str:
    """`repr` of a value of a stranger's file: short, printable, whatever its depth."""
    try:
        return shown(repr(value))
    except RecursionError:
        return "a deeply nested value"


def shown(value, length: int = 80) -> str:
    """A name or value of a stranger's file in an error, texts without quotes."""
    if not isinstance(value, str):
        return quoted(value)
    return value[:length].encode("ascii", "backslashreplace").decode() or "an empty text"
