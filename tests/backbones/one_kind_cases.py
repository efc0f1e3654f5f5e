"""Checkpoints whose layers are all of one kind, of every family that has kinds of layers.

Used by `tests/fixtures/make_one_kind.py` (transformers) and by `tests/backbones/test_one_kind.py` (ours).
"""

from tests.backbones.backbone_cases import QWEN
from tests.backbones.family_cases import ROUTED, L, config

FULL, SLIDING = ({"layer_types": [kind] * L} for kind in ("full_attention", "sliding_attention"))
WINDOW, ON = {"sliding_window": 7}, {"sliding_window": 7, "use_sliding_window": True}
QWEN2_MOE = dict(model_type="qwen2_moe", shared_expert_intermediate_size=28)


def both(family, **fields):
    return {
        f"{family}, all layers full": config(family, **fields, **FULL),
        f"{family}, all layers slide": config(family, **fields, **SLIDING),
    }


COMPARED = {  # with transformers
    **both("gemma3_text", **WINDOW),
    "gemma2, all layers slide": config("gemma2", **WINDOW, **SLIDING),
    "gpt_oss, all layers slide": ROUTED["gpt_oss"] | SLIDING,
    "smollm3, no layer with positions": config("smollm3", **ON, no_rope_layers=[0] * L),
}
TRACED = {  # only that they run
    "gemma2, all layers full": config("gemma2", **WINDOW, **FULL),
    "smollm3, all layers with positions": config("smollm3", **ON, no_rope_layers=[1] * L),
    **both("qwen2", **ON),
    **both("qwen3", **ON),
    "gpt_oss, all layers full": ROUTED["gpt_oss"] | FULL,
    "gemma3_text, every layer full": config("gemma3_text", **WINDOW | {"sliding_window_pattern": 1}),
    "qwen2, no layer below": config("qwen2", **ON, max_window_layers=0),
    "qwen2, every layer below": config("qwen2", **ON, max_window_layers=L),
    "mistral, all layers slide": config("mistral", **WINDOW),
    "mistral, all layers full": config("mistral"),
    "phi3, all layers slide": config("phi3", tie_word_embeddings=False, **WINDOW),
    "phi3, all layers full": config("phi3", tie_word_embeddings=False, sliding_window=None),
    "olmo2": config("olmo2", tie_word_embeddings=False),
    "mixtral, all layers slide": QWEN | dict(model_type="mixtral", num_local_experts=4, num_experts=None) | WINDOW,
    "qwen2_moe, no layer slides": QWEN | QWEN2_MOE | ON | dict(max_window_layers=0),
    "qwen2_moe, the one layer slides": QWEN | QWEN2_MOE | ON | dict(num_hidden_layers=1),
    "qwen3_moe, all layers slide": QWEN | dict(model_type="qwen3_moe", head_dim=12) | ON,
    "qwen3_moe, all layers full": QWEN | dict(model_type="qwen3_moe", head_dim=12),
}
