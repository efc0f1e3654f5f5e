"""What a GGUF file means: its config, its tensors under Hugging Face names, its tokenizer.

Architectures `llama` (also Mistral and SmolLM), `qwen2`, `qwen3`. GGUF interleaves the rows of q and k for `llama`
only (pairs 2i, 2i+1 rotate together); Hugging Face and our decoder rotate halves, so `_unpermute` undoes it. Without
that step SmolLM2's page perplexity is 187 instead of 28: it loads and looks plausible, but is wrong.
"""

import math

import numpy as np
import tokenizers

from molora_jax.backbones.llama import Llama
from molora_jax.errors import InputError
from molora_jax.io.gguf import Gguf
from molora_jax.io.tokenizer import Tokenizer, guarded

NAMES = {  # ours -> theirs; {i} is the layer
    "embed": "token_embd.weight",
    "final_norm": "output_norm.weight",
    "head": "output.weight",
    "attn_norm": "blk.{i}.attn_norm.weight",
    "ffn_norm": "blk.{i}.ffn_norm.weight",
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
_ARCHITECTURES = ("llama", "qwen2", "qwen3")
_PRE_OF = {"qwen2": "qwen2", "qwen3": "qwen2"}  # architecture -> tokenizer.ggml.pre of all its models
_SPECIAL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type


_READ = frozenset(  # after the architecture's name
    "attention.causal attention.head_count attention.head_count_kv attention.key_length attention.value_length "
    "attention.layer_norm_rms_epsilon attention.sliding_window block_count context_length embedding_length "
    "feed_forward_length vocab_size rope.freq_base rope.dimension_count rope.scale_linear rope.scaling.type "
    "rope.scaling.factor rope.scaling.original_context_length rope.scaling.attn_factor rope.scaling.yarn_beta_fast "
    "rope.scaling.yarn_beta_slow rope.scaling.yarn_ext_factor rope.scaling.yarn_attn_factor".split()
)
_HARMLESS = frozenset("rope.scaling.finetuned tensor_data_layout expert_used_count".split())


def _get(gguf, key, kinds, default=None):
    value = gguf.metadata.get(key, default)
    if isinstance(value, bool) != (kinds is bool) or not isinstance(value, kinds):
        raise InputError(f"{gguf.path}: {key}", got=f"{value!r:.100}", expected=f"metadata of type {kinds}")
    return value


def hf_config(gguf: Gguf) -> dict:
    """The file's shape as a Hugging Face `config.json`.

    Raises:
      InputError: an architecture or a setting of it that the decoder does not have.
    """
    arch = gguf.metadata.get("general.architecture")
    if not isinstance(arch, str) or arch not in _ARCHITECTURES:
        raise InputError(
            f"{gguf.path}: general.architecture", got=f"{arch!r:.80}", expected=f"one of {', '.join(_ARCHITECTURES)}",
            fix="Take a model of these, or extend molora_jax/io/gguf_model.py.",
        )  # fmt: skip
    if _get(gguf, f"{arch}.expert_count", int, 0):
        raise InputError(f"{gguf.path}: {arch}.expert_count", got="an MoE model", expected="a dense one")
    _check_keys(gguf, arch)
    if not _get(gguf, f"{arch}.attention.causal", bool, True):
        raise InputError(
            f"{gguf.path}: {arch}.attention.causal", got="false", expected="a model that sees no later token"
        )

    def whole(key, default=None):
        return _get(gguf, f"{arch}.{key}", int, default)

    def same(key, default=None):
        """A number, or an array of the same one for each layer, as llama.cpp reads it."""
        value = gguf.metadata.get(f"{arch}.{key}")
        if not isinstance(value, np.ndarray):
            return whole(key, default)
        layers = whole("block_count")
        if value.dtype.kind not in "iu" or len(value) != layers or len(set(value.tolist())) != 1:
            raise InputError(
                f"{gguf.path}: {arch}.{key}", got=f"{value.tolist()!r:.80}",
                expected=f"one number for all {layers} layers", fix="Layers of several sizes are not implemented here.",
            )  # fmt: skip
        return int(value[0])

    heads, width = whole("attention.head_count"), whole("embedding_length")
    head_dim = whole("attention.key_length", width // max(heads, 1))
    for key in ("attention.value_length", "rope.dimension_count"):
        if whole(key, head_dim) != head_dim:
            raise InputError(
                f"{gguf.path}: {arch}.{key}", got=str(whole(key)), expected=f"{head_dim}, the size of a head",
                fix="Values of another size, or positions on a part of the head, are not implemented here.",
            )  # fmt: skip
    config = {
        "architectures": [{"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}.get(arch, "Qwen3ForCausalLM")],
        "model_type": arch,
        "num_hidden_layers": whole("block_count"),
        "hidden_size": width,
        "intermediate_size": same("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": same("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": gguf.entries["token_embd.weight"][0][0] if "token_embd.weight" in gguf.entries else 0,
        "max_position_embeddings": whole("context_length"),
        "rope_theta": _get(gguf, f"{arch}.rope.freq_base", (int, float), 10000.0),
        "rms_norm_eps": _meant(_get(gguf, f"{arch}.attention.layer_norm_rms_epsilon", float)),
        "tie_word_embeddings": "output.weight" not in gguf.entries,
        "hidden_act": "silu",
        "attention_bias": arch != "qwen2" and "blk.0.attn_q.bias" in gguf.entries,
        "bos_token_id": gguf.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": gguf.metadata.get("tokenizer.ggml.eos_token_id"),
    }
    window = whole("attention.sliding_window", 0)
    if 0 < window < config["max_position_embeddings"]:  # llama.cpp gives these architectures full attention
        raise InputError(
            f"{gguf.path}: {arch}.attention.sliding_window", got=str(window),
            expected="none, or one of the whole context: readers of GGUF do not agree which layers slide",
            fix="Load this model as hf:ORG/NAME or dir:PATH, where config.json says it.",
        )  # fmt: skip
    scaling = _scaling(gguf, arch, config["max_position_embeddings"])
    if "rope_freqs.weight" in gguf.entries:
        if scaling is not None:
            raise InputError(
                f"{gguf.path}: {arch}.rope.scaling", got="a factor and rope_freqs.weight", expected="one of the two"
            )
        scaling = _llama3_scaling(gguf, config)
    return config | ({} if scaling is None else {"rope_scaling": scaling})


def _meant(number):
    """1e-5 is stored in float32: the number that was meant."""
    return float(np.format_float_positional(np.float32(number), unique=True))


def _check_keys(gguf, arch):
    """Refuses settings of the architecture that are not read and are set: they change the numbers."""
    for key, value in gguf.metadata.items():
        name = key.removeprefix(f"{arch}.")
        off = isinstance(value, (bool, int, float)) and not value
        if name != key and name not in _READ and name not in _HARMLESS and not off:
            raise InputError(
                f"{gguf.path}: {key[:80]}", got=f"{value!r:.80}", expected="a model without it: it changes the numbers",
                fix="Load this model as hf:ORG/NAME or dir:PATH, or choose a plain one.",
            )  # fmt: skip


def _scaling(gguf, arch, context) -> dict | None:
    """`rope_scaling` as llama.cpp reads the metadata: a factor without a type is linear, an old key gives it too."""

    def real(key, default):
        return _meant(_get(gguf, f"{arch}.rope.{key}", (int, float), default))

    kind = _get(gguf, f"{arch}.rope.scaling.type", str, "linear")
    if kind not in ("none", "linear", "yarn"):
        raise InputError(f"{gguf.path}: {arch}.rope.scaling.type", got=repr(kind)[:80], expected="none, linear or yarn")
    factor = real("scaling.factor", real("scale_linear", 0.0)) or 1.0
    if factor < 0:
        raise InputError(f"{gguf.path}: {arch}.rope.scaling.factor", got=str(factor), expected="a positive number")
    attention = real("scaling.attn_factor", 1.0) * real("scaling.yarn_attn_factor", 1.0)
    if (kind != "yarn" and attention != 1) or real("scaling.yarn_ext_factor", 1.0) != 1:
        raise InputError(
            f"{gguf.path}: {arch}.rope.scaling", got="attn_factor or yarn_ext_factor", expected="1 of both"
        )
    if kind == "none" or (kind == "linear" and factor == 1):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    return {
        "rope_type": "yarn", "factor": factor, "beta_fast": real("scaling.yarn_beta_fast", 32.0),
        "beta_slow": real("scaling.yarn_beta_slow", 1.0),
        "attention_factor": attention * (0.1 * math.log(factor) + 1 if factor > 1 else 1.0),
        "original_max_position_embeddings": _get(
            gguf, f"{arch}.rope.scaling.original_context_length", int, context
        ),
    }  # fmt: skip


def _llama3_scaling(gguf, config):
    """Llama 3.1's scaling is stored as one divisor per frequency only: refit its constants and check them."""
    stored = gguf.tensor("rope_freqs.weight").reshape(-1)
    low, high, context = 1.0, 4.0, 8192
    half = config["head_dim"] // 2
    unknown = InputError(
        f"{gguf.path}: rope_freqs.weight", got="an unknown rope scaling", expected="Llama 3.1's, or none",
        fix="Load this model as hf:ORG/NAME or dir:PATH.",
    )  # fmt: skip
    if stored.shape != (half,):
        raise unknown
    inverse = config["rope_theta"] ** (-np.arange(half) / half)
    factor = float(stored.max())
    wavelength = 2 * np.pi / inverse
    smooth = np.clip((context / wavelength - low) / (high - low), 0.0, 1.0)
    divisor = 1.0 / (smooth + (1.0 - smooth) / factor)
    if not np.allclose(stored, divisor, rtol=1e-3):
        raise unknown
    return {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
        "original_max_position_embeddings": context,
    }  # fmt: skip


def _unpermute(weight, heads):
    """Rows (pair, half) per head -> (half, pair). `[H * H_d, ...]`, also for a bias."""
    rest = weight.shape[1:]
    return weight.reshape(heads, -1, 2, *rest).swapaxes(1, 2).reshape(weight.shape)


def interleaved(weight, heads):
    """The inverse of `_unpermute`: what a file of the architecture `llama` holds."""
    rest = weight.shape[1:]
    return weight.reshape(heads, 2, -1, *rest).swapaxes(1, 2).reshape(weight.shape)


def tensor_sources(gguf: Gguf, config: Llama) -> dict:
    """Hugging Face name -> (shape, function that gives the float32 array).

    Raises:
      InputError: a tensor that is missing, left over or of another shape than the config says.
    """
    sources, left = {}, set(gguf.entries) - {"rope_freqs.weight"}
    permuted = gguf.metadata.get("general.architecture") == "llama"
    for path, leaf in config.shapes().items():
        ours, part = path.removeprefix("blocks/").split("/")[0], path.split("/")[-1]
        suffix, shape = {"kernel": ".weight", "bias": ".bias"}.get(part, ""), leaf.file_shape
        for theirs, index in leaf.files():
            name = (NAMES[ours] + suffix).format(i=index[0] if index else 0)
            if name not in gguf.entries or gguf.entries[name][0] != shape:
                got = f"shape {gguf.entries[name][0]}" if name in gguf.entries else "no such tensor"
                raise InputError(f"{gguf.path}: tensor {name}", got=got, expected=f"shape {shape} as its metadata says")
            left.discard(name)
            heads = {"q": config.heads, "k": config.kv_heads}.get(ours) if permuted else None

            def read(name=name, heads=heads):
                tensor = gguf.tensor(name)
                return tensor if heads is None else _unpermute(tensor, heads)

            sources[theirs] = (shape, read)
    if left:
        raise InputError(f"{gguf.path}: tensors", got=", ".join(sorted(left)[:5]), expected="only those of its family")
    return sources


_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _pre_tokenizer(pre):
    """`tokenizer.ggml.pre` -> (pre-tokenizer, normalizer, ignore_merges), or None where it is unknown."""
    pt = tokenizers.pre_tokenizers
    bytes_ = pt.ByteLevel(add_prefix_space=False, use_regex=False)
    if pre == "smollm":
        return pt.Sequence([pt.Digits(individual_digits=True), pt.ByteLevel(add_prefix_space=False)]), None, False
    if pre == "gpt-2":
        return pt.ByteLevel(add_prefix_space=False), None, False
    if pre == "llama-bpe":
        split = pt.Split(tokenizers.Regex(_WORDS % "{1,3}"), "isolated")
        return pt.Sequence([split, bytes_]), None, True
    if pre == "qwen2":
        split = pt.Split(tokenizers.Regex(_WORDS % ""), "isolated")
        return pt.Sequence([split, bytes_]), tokenizers.normalizers.NFC(), False
    return None


def tokenizer(gguf: Gguf) -> Tokenizer:
    """The byte-level BPE tokenizer in the file's metadata.

    Raises:
      InputError: another kind of tokenizer, an unknown `tokenizer.ggml.pre`, or a broken vocabulary.
    """
    elsewhere = "Load this model as hf:ORG/NAME or dir:PATH, where tokenizer.json says it all."
    kind = gguf.metadata.get("tokenizer.ggml.model")
    if not isinstance(kind, str) or kind != "gpt2":
        raise InputError(f"{gguf.path}: tokenizer.ggml.model", got=f"{kind!r:.80}", expected="'gpt2'", fix=elsewhere)
    pre = gguf.metadata.get("tokenizer.ggml.pre", "default")
    if isinstance(pre, str) and pre == "default":  # not said: known where all models of an architecture have the same
        pre = _PRE_OF.get(gguf.metadata.get("general.architecture"), "none, or 'default'")
    parts = _pre_tokenizer(pre) if isinstance(pre, str) else None
    if parts is None:
        raise InputError(
            f"{gguf.path}: tokenizer.ggml.pre", got=f"{pre!r:.80}", expected="smollm, llama-bpe, qwen2 or gpt-2",
            fix=elsewhere,
        )  # fmt: skip
    tokens, merges = _get(gguf, "tokenizer.ggml.tokens", list), _get(gguf, "tokenizer.ggml.merges", list)
    kinds = _get(gguf, "tokenizer.ggml.token_type", (np.ndarray, list), np.ones(len(tokens), np.int32))
    pairs = [tuple(merge.split(" ")) for merge in merges]
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens) or len(kinds) != len(tokens) or any(len(pair) != 2 for pair in pairs):
        raise InputError(f"{gguf.path}: tokenizer", got="repeated tokens or odd lengths", expected="a BPE vocabulary")
    pre_tokenizer, normalizer, ignore_merges = parts
    with guarded(f"{gguf.path}: tokenizer", "a BPE vocabulary"):
        inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, pairs, ignore_merges=ignore_merges))
    inner.pre_tokenizer, inner.decoder = pre_tokenizer, tokenizers.decoders.ByteLevel()
    if normalizer is not None:
        inner.normalizer = normalizer
    added = [(t, k) for t, k in zip(tokens, kinds, strict=True) if k in (_SPECIAL, _USER_DEFINED)]
    inner.add_tokens([tokenizers.AddedToken(t, special=bool(k == _SPECIAL), normalized=False) for t, k in added])

    def special_id(role):
        index = gguf.metadata.get(f"tokenizer.ggml.{role}_token_id")
        if index is not None and (not isinstance(index, int) or not 0 <= index < len(tokens)):
            raise InputError(f"{gguf.path}: {role}_token_id", got=repr(index), expected=f"an id below {len(tokens)}")
        return index

    def special(role):
        index = special_id(role)
        return None if index is None else tokens[index]

    ends = [special_id(role) for role in ("eos", "eot", "eom")]  # of the text, of a turn, of a message
    listed = gguf.metadata.get("tokenizer.ggml.eos_token_ids", [])
    for index in listed if isinstance(listed, (list, np.ndarray)) else [listed]:
        if not isinstance(index, (int, np.integer)) or not 0 <= index < len(tokens):
            expected = f"ids below {len(tokens)}"
            raise InputError(f"{gguf.path}: eos_token_ids", got=repr(index)[:80], expected=expected)
        ends.append(int(index))
    add_bos = gguf.metadata.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe")  # llama.cpp's default
    return Tokenizer(
        inner, bos=special("bos"), eos=special("eos"), pad=special("padding"),
        end_ids=[index for index in ends if index is not None], add_bos=bool(add_bos) and special("bos") is not None,
        template=gguf.metadata.get("tokenizer.chat_template"), where=gguf.path,
    )  # fmt: skip
