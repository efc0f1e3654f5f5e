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
SMOLLM2 = DecoderConfig(  # the default base, for counts and costs that need no weights
    family="llama", layers=30, width=576, ffn_width=1536, heads=9, kv_heads=3, head_dim=64, vocab=49152, context=8192,
    rope_base=100000.0, norm_eps=1e-5, tied=True,
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


def hf_shapes(config: DecoderConfig) -> dict:
    """Path of ours (`embed`, `blocks/q/kernel`) -> shape of one Hugging Face tensor; a matrix is `(D_out, D_in)`."""
    width, norm = (config.width,), (config.head_dim,)
    shapes = {"embed": (config.vocab, config.width), "final_norm": width}
    if not config.tied:
        shapes["head"] = (config.vocab, config.width)
    shapes |= {"blocks/attn_norm": width, "blocks/ffn_norm": width}
    for site in PROJECTIONS:
        d_in, d_out = config.dims(site)
        shapes[f"blocks/{site}/kernel"] = (d_out, d_in)
        if config.qkv_bias and site in ("q", "k", "v"):
            shapes[f"blocks/{site}/bias"] = (d_out,)
    if config.qk_norm:
        shapes |= {"blocks/q_norm": norm, "blocks/k_norm": norm}
    return shapes


def transposed(path: str) -> bool:
    """Whether ours is their tensor transposed: every matrix that is multiplied from the right, so not the embedding."""
    return path == "head" or path.endswith("/kernel")


def hf_name(path: str, layer: int = 0) -> str:
    """The Hugging Face name of a path of `hf_shapes`."""
    base, _, part = path.rpartition("/")
    suffix = {"kernel": ".weight", "bias": ".bias"}.get(part)
    return HF_NAMES[path].format(i=layer) if suffix is None else HF_NAMES[base].format(i=layer) + suffix


FAMILIES = {  # model_type -> switches beyond what config.json says
    "llama": {},
    "mistral": {},
    "qwen2": dict(qkv_bias=True),
    "qwen3": dict(qk_norm=True),
}


def from_hf(config: dict, *, where: str) -> DecoderConfig:
    """Reads a Hugging Face `config.json`.

    Raises:
      InputError: a field that is missing or of the wrong kind, or a family, activation, rope scaling or sliding window
        that the decoder does not have.
    """

    def number(key, default=None, *, kind=int, source=config):
        value = source.get(key)
        value = default if value is None else value
        # type(), not isinstance: True is no size
        if type(value) not in (int, kind) or not 0 < value < 1 << 31:
            raise InputError(f"{where}: {key}", got=repr(value)[:80], expected=f"a positive {kind.__name__}")
        return kind(value)

    family = config.get("model_type", "")
    if not isinstance(family, str) or family not in FAMILIES:
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
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key) and family != "qwen2":
            raise InputError(f"{where}: {key}", got="true", expected="false for this family")
    # transformers 5 moved rope_theta into rope_parameters
    rope = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or rope
    if not isinstance(rope, dict) or not isinstance(scaling, dict):
        raise InputError(f"{where}: rope_scaling", got=repr(scaling)[:80], expected="an object or null")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise InputError(f"{where}: rope_scaling", got=repr(kind), expected="none or llama3")
    llama3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    heads, width = number("num_attention_heads"), number("hidden_size")
    kv_heads, head_dim = number("num_key_value_heads", heads), number("head_dim", width // heads)
    if heads % kv_heads or head_dim % 2:
        raise InputError(
            f"{where}: heads", got=f"{heads} heads, {kv_heads} key-value heads of size {head_dim}",
            expected="key-value heads that divide the heads, and an even size",
        )  # fmt: skip
    return DecoderConfig(
        family=family,
        layers=number("num_hidden_layers"),
        width=width,
        ffn_width=number("intermediate_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=number("vocab_size"),
        context=number("max_position_embeddings"),
        rope_base=number("rope_theta", rope.get("rope_theta") or 10000.0, kind=float),
        norm_eps=number("rms_norm_eps", kind=float),
        tied=bool(config.get("tie_word_embeddings", False)),
        activation=activation,
        rope_scaling=None if kind == "default" else tuple(number(k, kind=float, source=scaling) for k in llama3),
        **FAMILIES[family],
    )
