"""Tiny model files for the tests of this folder: a GGUF writer and a Hugging Face folder, both of random numbers."""

import struct

import numpy as np
import tokenizers

from molora_jax.backbones import hf_config
from molora_jax.io import gguf_model, huggingface, quants
from molora_jax.io.tokenizer import byte_tokenizer

QUANT = {name: type_id for type_id, (name, *_) in quants.TYPES.items()}
TYPES = {bool: 7, int: 4, float: 6, str: 8}


def gguf_string(text):
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def gguf_value(value):
    """Type and value of one metadata entry."""
    if isinstance(value, list):
        kind = TYPES[type(value[0])]
        return struct.pack("<IIQ", 9, kind, len(value)) + b"".join(gguf_value(v)[4:] for v in value)
    kind = TYPES[type(value)]
    body = gguf_string(value) if kind == 8 else struct.pack("<" + {7: "?", 4: "I", 6: "f"}[kind], value)
    return struct.pack("<I", kind) + body


def gguf_bytes(metadata, tensors):
    """`tensors`: name -> (shape slowest first, type name, raw bytes)."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    head += b"".join(gguf_string(key) + gguf_value(value) for key, value in metadata.items())
    data = b""
    for name, (shape, kind, raw) in tensors.items():
        head += gguf_string(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape[::-1])
        head += struct.pack("<IQ", QUANT[kind], len(data))
        data += raw + b"\0" * (-len(raw) % 32)
    return head + b"\0" * (-len(head) % 32) + data


def llama_config(**changes):
    return {
        "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 261, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True, "hidden_act": "silu", **changes,
    }  # fmt: skip


def hf_tensors(config, seed=0):
    """Hugging Face name -> random float32 array."""
    rng, shaped = np.random.default_rng(seed), {}
    decoder = hf_config.from_hf(config, where="test")
    for leaf in decoder.shapes().values():
        for name, _ in leaf.files():
            shaped[name] = rng.standard_normal(leaf.file_shape, np.float32)
    return shaped


def byte_vocabulary():
    """256 byte tokens, then specials: 260 in all."""
    return [*sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), "<|pad|>", "<|bos|>", "<|im_start|>", "<|im_end|>"]


def write_hf_folder(folder, config, tensors):
    folder.mkdir(parents=True, exist_ok=True)
    sources = {name: (value.shape, lambda value=value: value) for name, value in tensors.items()}
    huggingface.write_folder(folder, config, sources, byte_tokenizer(), np.float32)
    return folder


def permute(weight, heads):
    """What llama.cpp's converter does to q and k: halves -> pairs."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def llama_gguf(arch="llama", *, metadata=(), drop=(), seed=0, **changes):
    """A whole tiny GGUF model as bytes, and the Hugging Face tensors that it should turn into."""
    config = llama_config(model_type=arch, **changes)
    wanted = hf_tensors(config, seed)
    return gguf_of(config, wanted, metadata=metadata, drop=drop), wanted


def gguf_of(config, values, *, metadata=(), drop=(), keep=lambda name: True) -> bytes:
    """A Hugging Face checkpoint as llama.cpp's converter writes it (a Mistral is a `llama` there)."""
    decoder = hf_config.from_hf(config, where="test")
    arch = {"mistral": "llama"}.get(decoder.family, decoder.family)
    tensors = {}
    for path, leaf in decoder.shapes().items():
        ours = path.removeprefix("blocks/").split("/")[0]
        suffix = {"kernel": ".weight", "bias": ".bias"}.get(path.split("/")[-1], "")
        for theirs, index in leaf.files():
            value = values[theirs]
            if arch == "llama" and ours in "qk":
                value = permute(value, decoder.heads if ours == "q" else decoder.kv_heads)
            name = (gguf_model.NAMES[ours] + suffix).format(i=index[0] if index else 0)
            tensors[name] = (value.shape, "F32", value.tobytes())
    scaling = decoder.rope_scaling
    if scaling is not None and scaling.kind == "llama3":
        divisor = 1 / scaling.multipliers(decoder.rope_base, decoder.head_dim)
        tensors["rope_freqs.weight"] = (divisor.shape, "F32", divisor.astype(np.float32).tobytes())
    vocabulary = byte_vocabulary()
    entries = {
        "general.architecture": arch, f"{arch}.block_count": decoder.layers, f"{arch}.embedding_length": decoder.width,
        f"{arch}.feed_forward_length": decoder.ffn_width, f"{arch}.attention.head_count": decoder.heads,
        f"{arch}.attention.head_count_kv": decoder.kv_heads, f"{arch}.context_length": decoder.context,
        f"{arch}.attention.layer_norm_rms_epsilon": decoder.norm_eps, f"{arch}.rope.freq_base": decoder.rope_base,
        f"{arch}.attention.key_length": decoder.head_dim, f"{arch}.attention.value_length": decoder.head_dim,
        f"{arch}.rope.dimension_count": decoder.head_dim,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": vocabulary,
        "tokenizer.ggml.token_type": [1] * 256 + [3] * 4, "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 257, "tokenizer.ggml.eos_token_id": 259,
    }  # fmt: skip
    vocabulary.append("ab")  # the product of the only merge
    entries["tokenizer.ggml.token_type"].append(1)
    entries |= dict(metadata)
    for key in drop:
        entries.pop(key, None)
        tensors.pop(key, None)
    return gguf_bytes(entries, {name: tensor for name, tensor in tensors.items() if keep(name)})
