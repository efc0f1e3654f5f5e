"""Tiny random checkpoints of the backbones beside llama: configs, weights by seed and name, what is compared.

Used by `tests/fixtures/make_backbones.py` (transformers) and by `tests/backbones/test_others.py` (ours); numpy alone.
"""

import zlib

import numpy as np

from tests.backbones.family_cases import S, V, project

COMMON = dict(
    num_hidden_layers=2, hidden_size=32, num_attention_heads=4, vocab_size=V, max_position_embeddings=64,
    initializer_range=0.02, torch_dtype="float32", pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
DECODER = COMMON | dict(
    num_key_value_heads=2, intermediate_size=24, rms_norm_eps=1e-5, hidden_act="silu", tie_word_embeddings=False,
    num_experts_per_tok=2,
)  # fmt: skip
QWEN = DECODER | dict(
    num_experts=6, moe_intermediate_size=20, decoder_sparse_step=1, mlp_only_layers=[], use_sliding_window=False,
)  # fmt: skip
GPT_OSS = DECODER | dict(
    model_type="gpt_oss", num_local_experts=4, head_dim=8, sliding_window=7, attention_bias=True,
    rope_scaling=dict(
        rope_type="yarn", factor=4.0, beta_fast=32.0, beta_slow=1.0, truncate=False, original_max_position_embeddings=16
    ),
)  # fmt: skip
CASES = {
    "bert": COMMON | dict(
        model_type="bert", intermediate_size=48, type_vocab_size=2, layer_norm_eps=1e-12, hidden_act="gelu",
        position_embedding_type="absolute",
    ),
    "mixtral": DECODER | dict(model_type="mixtral", num_local_experts=4, sliding_window=None, rope_theta=1e4),
    "mixtral, sliding window": DECODER | dict(model_type="mixtral", num_local_experts=4, sliding_window=7),
    "olmoe": DECODER | dict(model_type="olmoe", num_experts=6, norm_topk_prob=False),
    "olmoe, norm_topk_prob": DECODER | dict(model_type="olmoe", num_experts=6, norm_topk_prob=True),
    "qwen2_moe": QWEN | dict(model_type="qwen2_moe", shared_expert_intermediate_size=28, norm_topk_prob=False),
    "qwen2_moe, norm_topk_prob": QWEN | dict(
        model_type="qwen2_moe", shared_expert_intermediate_size=28, norm_topk_prob=True, tie_word_embeddings=True
    ),
    "qwen3_moe": QWEN | dict(model_type="qwen3_moe", norm_topk_prob=True, head_dim=12),
    "qwen3_moe, raw gates": QWEN | dict(model_type="qwen3_moe", norm_topk_prob=False, head_dim=12),
    "qwen2_moe, sliding window": QWEN | dict(
        model_type="qwen2_moe", shared_expert_intermediate_size=28, norm_topk_prob=False, use_sliding_window=True,
        sliding_window=7, max_window_layers=2,
    ),
    "qwen3_moe, sliding window": QWEN | dict(  # of all layers, whatever layer_types says
        model_type="qwen3_moe", norm_topk_prob=True, head_dim=12, use_sliding_window=True, sliding_window=7,
        layer_types=["full_attention", "sliding_attention"],
    ),
    "gpt_oss": GPT_OSS,
    "gpt_oss, full attention": GPT_OSS | dict(
        layer_types=["full_attention"] * 2, rope_scaling=None, tie_word_embeddings=True,
        rope_parameters=dict(rope_type="default", rope_theta=1e4),
    ),
}  # fmt: skip
SSM = dict(
    num_hidden_layers=2, hidden_size=32, vocab_size=V, state_size=6, conv_kernel=4, expand=2, time_step_rank=3,
    layer_norm_epsilon=1e-5, hidden_act="silu", residual_in_fp32=True, use_bias=False, use_conv_bias=True,
    initializer_range=0.02, torch_dtype="float32", pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
CASES |= {
    "mamba": SSM | dict(model_type="mamba"),
    "mamba, biases and a head": SSM | dict(
        model_type="mamba", use_bias=True, use_conv_bias=False, tie_word_embeddings=False, residual_in_fp32=False,
        time_step_rank="auto", conv_kernel=3,
    ),
    "falcon_mamba": SSM | dict(model_type="falcon_mamba", mixer_rms_eps=1e-6),
}  # fmt: skip
SITES = {
    "bert": {
        "q": "encoder.layer.{}.attention.self.query", "k": "encoder.layer.{}.attention.self.key",
        "v": "encoder.layer.{}.attention.self.value", "o": "encoder.layer.{}.attention.output.dense",
        "up": "encoder.layer.{}.intermediate.dense", "down": "encoder.layer.{}.output.dense",
    },
    "mamba": {f"{s}_proj": f"backbone.layers.{{}}.mixer.{s}_proj" for s in ("in", "x", "dt", "out")},
    "moe": {
        **{site: f"model.layers.{{}}.self_attn.{site}_proj" for site in "qkvo"}, "router": "model.layers.{}.mlp.gate",
    },
}  # fmt: skip


def sites(config):
    found = next((own for kind, own in SITES.items() if kind in config["model_type"]), SITES["moe"])
    return found | {"router": "model.layers.{}.mlp.router"} if config["model_type"] == "gpt_oss" else found


def value(case: str, name: str, shape) -> np.ndarray:
    """The tensor of a checkpoint, by the case and its name in the file."""
    rng = np.random.default_rng(zlib.crc32(f"{case}/{name}".encode()))
    x, scale = rng.standard_normal(shape), 1.0 if "embed" in name else 0.7 * shape[-1] ** -0.5
    made = (
        (6 if "gate_up" in name else 0.3) * x
        if name.endswith("bias")
        else 1 + 0.2 * x
        if len(shape) == 1
        else scale * x
    )
    return made.astype(np.float32)


def rows():
    """`tokens, targets, types [2, S]` and the valid length of each row."""
    rng = np.random.default_rng(11)
    tokens, targets = (rng.integers(0, V, (2, S)).astype(np.int32) for _ in range(2))
    return tokens, targets, (np.arange(S) > 9).astype(np.int32) * np.ones((2, 1), np.int32), np.array([S, S - 7])


def weighting(shape) -> np.ndarray:
    """What a loss multiplies an encoder's hidden states with."""
    return np.random.default_rng(12).standard_normal(shape).astype(np.float32)


def summary(output, loss, gradients: dict) -> dict:
    """What is stored and compared. `output [2, S, V | D]`; `gradients` by site, `[L, D_in, D_out]`."""
    out = {"output": project(output, seed=1), "loss": loss} | {s: project(g, seed=2) for s, g in gradients.items()}
    return {name: np.asarray(x, np.float32) for name, x in out.items()}
