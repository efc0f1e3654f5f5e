"""The families that are known by their `model_type`, a row each, and the shapes that have a name of their own.

A llama-like family is a row of `FAMILIES`: the switches of `Llama` that it sets, what transformers takes for a field
that its config.json lacks, and which fields it alone reads.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from molora_jax.backbones import bert
from molora_jax.backbones.bert import Bert
from molora_jax.backbones.hf_fields import shown
from molora_jax.backbones.llama import Llama
from molora_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Family:
    """A `model_type` of Hugging Face.

    `switches`: fields of the backbone beyond what config.json says; `defaults`: of fields that the file lacks;
    `windowed`: its sliding window is read, `gated` if `use_sliding_window` has to say so; `biased`: `attention_bias` is
    read, for q, k, v and o; `reads`: fields that it alone reads; `more(config, number, where)`: fields of the backbone
    that follow from those; `whole`: the backbone's own reader of a config, in place of Llama's.
    """

    switches: dict = dataclasses.field(default_factory=dict)
    defaults: dict = dataclasses.field(default_factory=dict)
    windowed: bool = False
    gated: bool = True
    biased: bool = False
    reads: tuple[str, ...] = ()
    more: Callable[..., dict[str, Any]] = lambda config, number, where: {}
    backbone: type = Llama
    whole: Callable[..., Any] | None = None


def _unrotated(config, number, where) -> dict:
    """SmolLM3: `no_rope_layers` has a 1 for each layer with positions; without it every so many have none."""
    layers, marks = number("num_hidden_layers"), config.get("no_rope_layers")
    if marks is None:
        every = number("no_rope_layer_interval", 4)
        marks = [int((i + 1) % every != 0) for i in range(layers)]
    if not isinstance(marks, list) or len(marks) < layers or any(type(m) is not int or m not in (0, 1) for m in marks):
        raise InputError(f"{where}: no_rope_layers", got=shown(marks), expected=f"a 0 or 1 for each of {layers} layers")
    return {"unrotated": tuple(i for i in range(layers) if not marks[i])}


_QWEN = dict(max_position_embeddings=32768, num_key_value_heads=32, sliding_window=4096, max_window_layers=28)
FAMILIES = {
    "llama": Family(defaults=dict(max_position_embeddings=2048), biased=True),
    "mistral": Family(
        defaults=dict(max_position_embeddings=131072, num_key_value_heads=8, sliding_window=4096),
        windowed=True, gated=False,
    ),
    "qwen2": Family(dict(qkv_bias=True), _QWEN, windowed=True),
    "qwen3": Family(dict(qk_norm=True), _QWEN | dict(head_dim=128), windowed=True, biased=True),
    "smollm3": Family(
        defaults=dict(max_position_embeddings=32768, num_key_value_heads=4, rope_theta=2e6, tie_word_embeddings=True),
        windowed=True, biased=True, reads=("no_rope_layers", "no_rope_layer_interval"), more=_unrotated,
    ),
    "bert": Family(
        reads=(
            "layer_norm_eps", "type_vocab_size", "position_embedding_type", "attention_probs_dropout_prob",
            "gradient_checkpointing",
        ),
        whole=bert.read,
    ),
}  # fmt: skip

TINY = Llama(
    family="llama", layers=4, width=64, ffn_width=128, heads=4, kv_heads=2, head_dim=16, vocab=320, context=512,
    rope_base=10000.0, norm_eps=1e-5, tied=True,
)  # fmt: skip
TINY_UNTIED = dataclasses.replace(TINY, tied=False)
TINY_QWEN3 = dataclasses.replace(TINY, family="qwen3", qk_norm=True, head_dim=32, norm_eps=1e-6)  # heads wider than D
TINY_BERT = Bert(
    family="bert", layers=4, width=64, ffn_width=128, heads=4, vocab=320, context=512, token_types=2, norm_eps=1e-12
)
RANDOM = {  # of `base.source=random:NAME`
    "tiny": TINY, "tiny-untied": TINY_UNTIED, "tiny-qwen3": TINY_QWEN3, "tiny-bert": TINY_BERT,
}  # fmt: skip
SMOLLM2 = Llama(  # the default base, for counts and costs that need no weights
    family="llama", layers=30, width=576, ffn_width=1536, heads=9, kv_heads=3, head_dim=64, vocab=49152, context=8192,
    rope_base=100000.0, norm_eps=1e-5, tied=True,
)  # fmt: skip
