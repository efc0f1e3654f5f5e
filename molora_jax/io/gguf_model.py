"""What a GGUF file means: its config, its tensors under Hugging Face names, its tokenizer.

Architectures `llama` (also Mistral and SmolLM), `qwen2`, `qwen3`. GGUF interleaves the rows of q and k for `llama`
only (pairs 2i, 2i+1 rotate together); Hugging Face and our decoder rotate halves, so `_unpermute` undoes it. Without
that step SmolLM2's page perplexity is 187 instead of 28: it loads and looks plausible, but is wrong.
"""

import numpy as np
import tokenizers

from molora_jax.errors import InputError
from molora_jax.io.gguf import Gguf
from molora_jax.io.tokenizer import Tokenizer, guarded
from molora_jax.models import families

_NAMES = {  # ours -> theirs; {i} is the layer
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
_SPECIAL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type


def _get(gguf, key, kinds, default=None):
    value = gguf.metadata.get(key, default)
    if isinstance(value, bool) != (kinds is bool) or not isinstance(value, kinds):
        raise InputError(f"{gguf.path}: {key}", got=repr(value)[:100], expected=f"metadata of type {kinds}")
    return value


def hf_config(gguf: Gguf) -> dict:
    """The file's shape as a Hugging Face `config.json`."""
    arch = gguf.metadata.get("general.architecture")
    if arch not in _ARCHITECTURES:
        raise InputError(
            f"{gguf.path}: general.architecture", got=repr(arch), expected=f"one of {', '.join(_ARCHITECTURES)}",
            fix="Take a model of these, or extend molora_jax/io/gguf_model.py.",
        )  # fmt: skip
    if gguf.metadata.get(f"{arch}.expert_count"):
        raise InputError(f"{gguf.path}: {arch}.expert_count", got="an MoE model", expected="a dense one")

    def whole(key, default=None):
        return _get(gguf, f"{arch}.{key}", int, default)

    heads, width = whole("attention.head_count"), whole("embedding_length")
    scaling = gguf.metadata.get(f"{arch}.rope.scaling.type", "none")
    if scaling != "none":
        raise InputError(f"{gguf.path}: {arch}.rope.scaling.type", got=repr(scaling), expected="none")
    config = {
        "architectures": [{"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}.get(arch, "Qwen3ForCausalLM")],
        "model_type": arch,
        "num_hidden_layers": whole("block_count"),
        "hidden_size": width,
        "intermediate_size": whole("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": whole("attention.head_count_kv", heads),
        "head_dim": whole("attention.key_length", width // max(heads, 1)),
        "vocab_size": gguf.entries["token_embd.weight"][0][0] if "token_embd.weight" in gguf.entries else 0,
        "max_position_embeddings": whole("context_length"),
        "rope_theta": _get(gguf, f"{arch}.rope.freq_base", (int, float), 10000.0),
        "rms_norm_eps": _get(gguf, f"{arch}.attention.layer_norm_rms_epsilon", float),
        "tie_word_embeddings": "output.weight" not in gguf.entries,
        "hidden_act": "silu",
        "bos_token_id": gguf.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": gguf.metadata.get("tokenizer.ggml.eos_token_id"),
    }
    # 1e-5 is stored in float32: give back the number that was meant
    config["rms_norm_eps"] = float(np.format_float_positional(np.float32(config["rms_norm_eps"]), unique=True))
    if "rope_freqs.weight" in gguf.entries:
        config["rope_scaling"] = _llama3_scaling(gguf, config)
    return config


def _llama3_scaling(gguf, config):
    """Llama 3.1's scaling is stored as one divisor per frequency only: refit its constants and check them."""
    stored = gguf.tensor("rope_freqs.weight").reshape(-1)
    low, high, context = 1.0, 4.0, 8192
    half = config["head_dim"] // 2
    inverse = config["rope_theta"] ** (-np.arange(half) / half)
    factor = float(stored.max())
    wavelength = 2 * np.pi / inverse
    smooth = np.clip((context / wavelength - low) / (high - low), 0.0, 1.0)
    divisor = 1.0 / (smooth + (1.0 - smooth) / factor)
    if stored.shape != (half,) or not np.allclose(stored, divisor, rtol=1e-3):
        raise InputError(
            f"{gguf.path}: rope_freqs.weight", got="an unknown rope scaling", expected="Llama 3.1's, or none",
            fix="Load this model as hf:ORG/NAME or dir:PATH.",
        )  # fmt: skip
    return {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
        "original_max_position_embeddings": context,
    }  # fmt: skip


def _unpermute(weight, heads):
    """Rows (pair, half) per head -> (half, pair). `[H * H_d, ...]`, also for a bias."""
    rest = weight.shape[1:]
    return weight.reshape(heads, -1, 2, *rest).swapaxes(1, 2).reshape(weight.shape)


def tensor_sources(gguf: Gguf, config: families.DecoderConfig) -> dict:
    """Hugging Face name -> (shape, function that gives the float32 array).

    Raises:
      InputError: a tensor that is missing, left over or of another shape than the config says.
    """
    sources, left = {}, set(gguf.entries) - {"rope_freqs.weight"}
    for path, shape in families.hf_shapes(config).items():
        ours, part = path.removeprefix("blocks/").split("/")[0], path.split("/")[-1]
        suffix = {"kernel": ".weight", "bias": ".bias"}.get(part, "")
        for i in range(config.layers if path.startswith("blocks/") else 1):
            name = (_NAMES[ours] + suffix).format(i=i)
            if name not in gguf.entries or gguf.entries[name][0] != shape:
                got = f"shape {gguf.entries[name][0]}" if name in gguf.entries else "no such tensor"
                raise InputError(f"{gguf.path}: tensor {name}", got=got, expected=f"shape {shape} as its metadata says")
            left.discard(name)
            heads = {"q": config.heads, "k": config.kv_heads}.get(ours) if config.family == "llama" else None

            def read(name=name, heads=heads):
                tensor = gguf.tensor(name)
                return tensor if heads is None else _unpermute(tensor, heads)

            sources[families.hf_name(path, i)] = (shape, read)
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
    if pre in ("default", "gpt-2"):
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
    kind, pre = gguf.metadata.get("tokenizer.ggml.model"), gguf.metadata.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2":
        raise InputError(f"{gguf.path}: tokenizer.ggml.model", got=repr(kind), expected="'gpt2'", fix=elsewhere)
    parts = _pre_tokenizer(pre)
    if parts is None:
        raise InputError(
            f"{gguf.path}: tokenizer.ggml.pre", got=repr(pre), expected="smollm, llama-bpe, qwen2, gpt-2 or default",
            fix=elsewhere,
        )  # fmt: skip
    tokens, merges = _get(gguf, "tokenizer.ggml.tokens", list), _get(gguf, "tokenizer.ggml.merges", list)
    kinds = gguf.metadata.get("tokenizer.ggml.token_type", np.ones(len(tokens), np.int32))
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
    add_bos = gguf.metadata.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe")  # llama.cpp's default
    return Tokenizer(
        inner, bos=special("bos"), eos=special("eos"), pad=special("padding"),
        end_ids=[index for index in ends if index is not None], add_bos=bool(add_bos) and special("bos") is not None,
        template=gguf.metadata.get("tokenizer.chat_template"), where=gguf.path,
    )  # fmt: skip
