"""What a GGUF file means: its config, and its tensors under Hugging Face names.

The architectures are those of `gguf_arch.py`. GGUF interleaves the rows of q and k for some (pairs 2i, 2i+1 rotate
together); Hugging Face and our decoder rotate halves, so `_unpermute` undoes it. Without that step SmolLM2's page
perplexity is 187 instead of 28: it loads and looks plausible, but is wrong.
"""

import math

import numpy as np

from molora_jax.backbones.base import Backbone
from molora_jax.errors import InputError
from molora_jax.io.gguf import Gguf
from molora_jax.io.gguf_arch import ARCHITECTURES, meant

_READ = frozenset(  # after the architecture's name
    "attention.causal attention.head_count attention.head_count_kv attention.key_length attention.value_length "
    "attention.layer_norm_rms_epsilon attention.sliding_window block_count context_length embedding_length "
    "feed_forward_length vocab_size rope.freq_base rope.dimension_count rope.scale_linear rope.scaling.type "
    "rope.scaling.factor rope.scaling.original_context_length rope.scaling.attn_factor rope.scaling.yarn_beta_fast "
    "rope.scaling.yarn_beta_slow rope.scaling.yarn_ext_factor rope.scaling.yarn_attn_factor".split()
)
_LISTS = {"rope_factors_long.weight", "rope_factors_short.weight"}  # phi3's, as rope_freqs is llama's: no parameters
_HARMLESS = frozenset("rope.scaling.finetuned tensor_data_layout expert_used_count".split())


def hf_config(gguf: Gguf) -> dict:
    """The file's shape as a Hugging Face `config.json`.

    Raises:
      InputError: an architecture or a setting of it that the decoder does not have.
    """
    arch = gguf.metadata.get("general.architecture")
    if not isinstance(arch, str) or arch not in ARCHITECTURES:
        raise InputError(
            f"{gguf.path}: general.architecture", got=f"{arch!r:.80}", expected=f"one of {', '.join(ARCHITECTURES)}",
            fix="Take a model of these, or extend molora_jax/io/gguf_arch.py.",
        )  # fmt: skip
    row = ARCHITECTURES[arch]
    if "expert_count" not in row.reads and gguf.get(f"{arch}.expert_count", int, 0):
        raise InputError(f"{gguf.path}: {arch}.expert_count", got="an MoE model", expected="a dense one")
    _check_keys(gguf, arch, row.reads)
    if not gguf.get(f"{arch}.attention.causal", bool, True):
        raise InputError(
            f"{gguf.path}: {arch}.attention.causal", got="false", expected="a model that sees no later token"
        )

    def whole(key, default=None):
        return gguf.get(f"{arch}.{key}", int, default)

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
        if whole(key, head_dim) != head_dim and (arch, key) != ("phi3", "rope.dimension_count"):
            raise InputError(
                f"{gguf.path}: {arch}.{key}", got=str(whole(key)), expected=f"{head_dim}, the size of a head",
                fix="Values of another size, or positions on a part of the head, are not implemented here.",
            )  # fmt: skip
    config = {
        "architectures": [f"{row.title}ForCausalLM"],
        "model_type": row.family,
        "num_hidden_layers": whole("block_count"),
        "hidden_size": width,
        "intermediate_size": same("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": same("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": gguf.entries["token_embd.weight"][0][0] if "token_embd.weight" in gguf.entries else 0,
        "max_position_embeddings": whole("context_length"),
        "rope_theta": gguf.get(f"{arch}.rope.freq_base", (int, float), 10000.0),
        "rms_norm_eps": meant(gguf.get(f"{arch}.attention.layer_norm_rms_epsilon", float)),
        "tie_word_embeddings": "output.weight" not in gguf.entries,
        "hidden_act": "silu",
        "attention_bias": arch != "qwen2" and "blk.0.attn_q.bias" in gguf.entries,
        "bos_token_id": gguf.get_if_there("tokenizer.ggml.bos_token_id", int),
        "eos_token_id": gguf.get_if_there("tokenizer.ggml.eos_token_id", int),
    }
    window = whole("attention.sliding_window", 0)
    if row.sliding:
        config["sliding_window"] = window or None
    elif 0 < window < config["max_position_embeddings"]:  # llama.cpp gives these architectures full attention
        raise InputError(
            f"{gguf.path}: {arch}.attention.sliding_window", got=str(window),
            expected="none, or one of the whole context: readers of GGUF do not agree which layers slide",
            fix="Load this model as hf:ORG/NAME or dir:PATH, where config.json says it.",
        )  # fmt: skip
    own = row.config(gguf, arch, config)
    if "rope_scaling" in own:
        return config | own
    scaling = _scaling(gguf, arch, config["max_position_embeddings"])
    if "rope_freqs.weight" in gguf.entries:
        if scaling is not None:
            raise InputError(
                f"{gguf.path}: {arch}.rope.scaling", got="a factor and rope_freqs.weight", expected="one of the two"
            )
        scaling = _llama3_scaling(gguf, config)
    return config | own | ({} if scaling is None else {"rope_scaling": scaling})


def _check_keys(gguf, arch, reads):
    """Refuses settings of the architecture that are not read and are set: they change the numbers."""
    for key, value in gguf.metadata.items():
        name = key.removeprefix(f"{arch}.")
        off = isinstance(value, (bool, int, float)) and not value
        if name != key and name not in _READ and name not in _HARMLESS and name not in reads and not off:
            raise InputError(
                f"{gguf.path}: {key[:80]}", got=f"{value!r:.80}", expected="a model without it: it changes the numbers",
                fix="Load this model as hf:ORG/NAME or dir:PATH, or choose a plain one.",
            )  # fmt: skip


def _scaling(gguf, arch, context) -> dict | None:
    """`rope_scaling` as llama.cpp reads the metadata: a factor without a type is linear, an old key gives it too."""

    def real(key, default):
        return meant(gguf.get(f"{arch}.rope.{key}", (int, float), default))

    kind = gguf.get(f"{arch}.rope.scaling.type", str, "linear")
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
        "original_max_position_embeddings": gguf.get(
            f"{arch}.rope.scaling.original_context_length", int, context
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


def tensor_sources(gguf: Gguf, config: Backbone) -> dict:
    """Hugging Face name -> (shape, function that gives the float32 array).

    Raises:
      InputError: a tensor that is missing, left over or of another shape than the config says.
    """
    row = ARCHITECTURES[gguf.metadata["general.architecture"]]
    held, left = {}, set(gguf.entries) - {"rope_freqs.weight"} - (_LISTS if row.family == "phi3" else set())
    for path, leaf in config.shapes().items():
        name_of, kept = _name(row, path), leaf.shape[leaf.stacked :]
        by_expert = row.split and len(kept) == 3  # [E, D_in, D_out], turned there
        shape = (kept[0], kept[2], kept[1]) if by_expert else kept if row.split and leaf.part else leaf.file_shape
        for theirs, index in leaf.files():
            name = name_of.format(i=index[0] if index else 0)
            if name not in gguf.entries or gguf.entries[name][0] != shape:
                got = f"shape {gguf.entries[name][0]}" if name in gguf.entries else "no such tensor"
                raise InputError(f"{gguf.path}: tensor {name}", got=got, expected=f"shape {shape} as its metadata says")
            left.discard(name)
            heads = {"q": config.heads, "k": config.kv_heads}.get(path.split("/")[1]) if _permuted(row, path) else None

            def read(name=name, heads=heads, by_expert=by_expert, less=row.plus_one and "norm" in path):
                tensor = gguf.tensor(name)
                tensor = tensor if heads is None else _unpermute(tensor, heads)
                tensor = tensor.swapaxes(1, 2) if by_expert else tensor
                return tensor - 1 if less else tensor

            held.setdefault(theirs, []).append((leaf, read))
    if left:
        raise InputError(f"{gguf.path}: tensors", got=", ".join(sorted(left)[:5]), expected="only those of its family")

    def whole(leaves):
        if not row.split or leaves[0][0].part is None:  # a fused tensor is one there too
            return leaves[0][1]()
        out = np.empty(leaves[0][0].file_shape, np.float32)
        for leaf, read in leaves:
            leaf.taken(out)[...] = read()
        return out

    return {n: (leaves[0][0].file_shape, lambda leaves=leaves: whole(leaves)) for n, leaves in held.items()}


def _name(row, path: str) -> str:
    """The name of a leaf's tensors, with `{i}` for the layer."""
    stem = path.removeprefix("blocks/")
    if stem in row.names:
        return row.names[stem]
    site, _, part = stem.partition("/")
    return row.names[site] + {"kernel": ".weight", "bias": ".bias"}[part]


def _permuted(row, path: str) -> bool:
    return row.permuted and path.startswith(("blocks/q/", "blocks/k/"))
