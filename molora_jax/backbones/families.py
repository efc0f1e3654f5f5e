"""The decoder families that one decoder serves, as switches and name tables.

`DecoderConfig` is the inner form of a model's shape; `hf_config.py` reads it from a Hugging Face `config.json`.
`HF_NAMES` maps a parameter of ours to theirs (`{i}` is the layer).

Ours is a plain nested dict; kernels are `[D_in, D_out]` and stacked over layers:

    embed [V, D]   final_norm [D]   head [D, V] (absent when tied)
    blocks/{attn_norm, ffn_norm} [L, D]
    blocks/{q, k, v, o, gate, up, down}/kernel [L, D_in, D_out]   and /bias [L, D_out] where the model has one
    blocks/{q_norm, k_norm} [L, H_d]    where the family has one (Qwen3)
"""

import dataclasses

from molora_jax.backbones import rope
from molora_jax.config.fields import PROJECTIONS


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
    rope_scaling: rope.RopeScaling | None = None
    o_bias: bool = False
    window: int | None = None  # a query of a sliding layer sees so many keys, its own the last; None: no layer slides
    sliding: tuple[int, ...] = ()  # the layers that slide

    def dims(self, site: str) -> tuple[int, int]:
        """`(D_in, D_out)` of a projection."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        d, f = self.width, self.ffn_width
        table = dict(q=(d, q), k=(d, kv), v=(d, kv), o=(q, d), gate=(d, f), up=(d, f), down=(f, d))
        return table[site]

    def biased(self, site: str) -> bool:
        return self.qkv_bias if site in ("q", "k", "v") else self.o_bias and site == "o"


TINY = DecoderConfig(
    family="llama", layers=4, width=64, ffn_width=128, heads=4, kv_heads=2, head_dim=16, vocab=320, context=512,
    rope_base=10000.0, norm_eps=1e-5, tied=True,
)  # fmt: skip
TINY_UNTIED = dataclasses.replace(TINY, tied=False)
TINY_QWEN3 = dataclasses.replace(TINY, family="qwen3", qk_norm=True, head_dim=32, norm_eps=1e-6)  # heads wider than D
RANDOM = {"tiny": TINY, "tiny-untied": TINY_UNTIED, "tiny-qwen3": TINY_QWEN3}  # of `base.source=random:NAME`
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
        if config.biased(site):
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
