"""The decoder families that one decoder serves, as switches and name tables.

`DecoderConfig` is the inner form of a model's shape. `from_hf` reads it from a Hugging Face `config.json`; `HF_NAMES`
maps a parameter of ours to theirs (`{i}` is the layer).

Ours is a plain nested dict; kernels are `[D_in, D_out]` and stacked over layers:

    embed [V, D]   final_norm [D]   head [D, V] (absent when tied)
    blocks/{attn_norm, ffn_norm} [L, D]
    blocks/{q, k, v, o, gate, up, down}/kernel [L, D_in, D_out]   and /bias [L, D_out] where the family has one
    blocks/{q_norm, k_norm} [L, H_d]    where the family has one (Qwen3)
"""

import dataclasses

from molora_jax.errors import InputError

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
ATTENTION = ("q", "k", "v", "o")
FFN = ("gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape and switches of a decoder-only model. `D = width`, `F = ffn_width`, `H_d = head_dim`."""

    family: str
    layers: int
    width: int
    ffn_width: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    rope_base: float
    norm_eps: float
    tied: bool
    activation: str = "silu"
    qkv_bias: bool = False
    qk_norm: bool = False
    rope_scaling: tuple[float, float, float, float] | None = None  # llama3: factor, low, high, original context

    def dims(self, site: str) -> tuple[int, int]:
        """`(D_in, D_out)` of a projection."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        d, f = self.width, self.ffn_width
        table = dict(q=(d, q), k=(d, kv), v=(d, kv), o=(q, d), gate=(d, f), up=(d, f), down=(f, d))
        return table[site]


TINY = DecoderConfig(
    family="llama", layers=4, width=64, ffn_width=128, heads=4, kv_heads=2, head_dim=16, vocab=320, context=512,
    rope_base=10000.0, norm_eps=1e-5, tied=True,
)  # fmt: skip

_BLOCK = {
    "attn_norm": "input_layernorm.weight",
    "ffn_norm": "post_attention_layernorm.weight",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
}
HF_NAMES = {
    "embed": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
    **{f"blocks/{ours}": f"model.layers.{{i}}.{theirs}" for ours, theirs in _BLOCK.items()},
}
FAMILIES = {  # model_type -> switches beyond what config.json says
    "llama": {},
    "mistral": {},
    "qwen2": dict(qkv_bias=True),
    "qwen3": dict(qk_norm=True),
}


def from_hf(config: dict, *, where: str) -> DecoderConfig:
    """Reads a Hugging Face `config.json`.

    Raises:
      InputError: a family, activation, rope scaling or sliding window that the decoder does not have.
    """
    family = config.get("model_type", "")
    if family not in FAMILIES:
        raise InputError(
            f"{where}: model_type", got=repr(family), expected=f"one of {', '.join(FAMILIES)}",
            fix="Choose a model of these families, or add its switches to molora_jax/models/families.py.",
        )  # fmt: skip
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "gelu"):
        raise InputError(f"{where}: hidden_act", got=repr(activation), expected="silu or gelu")
    window = config.get("sliding_window") if config.get("use_sliding_window", family == "mistral") else None
    if window:
        raise InputError(
            f"{where}: sliding_window", got=str(window), expected="none (attention here is full)",
            fix="Set it to null if your sequences are shorter than the window.",
        )  # fmt: skip
    # transformers 5 moved rope_theta into rope_parameters
    rope = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or rope
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise InputError(f"{where}: rope_scaling", got=repr(kind), expected="none or llama3")
    heads, width = config["num_attention_heads"], config["hidden_size"]
    return DecoderConfig(
        family=family,
        layers=config["num_hidden_layers"],
        width=width,
        ffn_width=config["intermediate_size"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads", heads),
        head_dim=config.get("head_dim") or width // heads,
        vocab=config["vocab_size"],
        context=config["max_position_embeddings"],
        rope_base=float(config.get("rope_theta") or rope.get("rope_theta") or 10000.0),
        norm_eps=config["rms_norm_eps"],
        tied=bool(config.get("tie_word_embeddings", False)),
        activation=activation,
        rope_scaling=None
        if kind == "default"
        else (
            float(scaling["factor"]),
            float(scaling["low_freq_factor"]),
            float(scaling["high_freq_factor"]),
            float(scaling["original_max_position_embeddings"]),
        ),
        **FAMILIES[family],
    )
