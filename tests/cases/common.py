"""Tiny models of strangers, made on the spot: a byte tokenizer, a config, random weights, rows of text."""

import json
import pathlib

import numpy as np
import safetensors.numpy
import tokenizers

from configs.common import get_config
from molora_jax import data
from molora_jax.evaluation.run import load_base_run
from molora_jax.io import tokenizer as tokenizer_lib

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = ("<pad>", "<s>", "<|im_start|>", "<|im_end|>", "</s>")  # ids 256 to 260
TOKENS = dict(bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def byte_inner(specials=SPECIALS):
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.add_special_tokens(list(specials))
    return inner


def config(**changes):
    fields = dict(
        model_type="llama", hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=288, max_position_embeddings=512, rms_norm_eps=1e-5, rope_theta=10000.0,
        tie_word_embeddings=True, hidden_act="silu",
    )  # fmt: skip
    return {name: value for name, value in {**fields, **changes}.items() if value is not ...}


def weights(config, seed=0, scale=0.2):
    """Hugging Face name -> float32 array."""
    rng, shapes = np.random.default_rng(seed), {}
    D, F, V = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    H, K = config["num_attention_heads"], config["num_key_value_heads"]
    h = config.get("head_dim") or D // H
    shapes |= {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (V, D)
    for i in range(config["num_hidden_layers"]):
        layer = {
            "input_layernorm": (D,), "post_attention_layernorm": (D,), "self_attn.q_proj": (H * h, D),
            "self_attn.k_proj": (K * h, D), "self_attn.v_proj": (K * h, D), "self_attn.o_proj": (D, H * h),
            "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F),
        }  # fmt: skip
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    arrays = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    return {n: (1 + 0.1 * x if x.ndim == 1 else scale * x).astype(np.float32) for n, x in arrays.items()}


def tokenizer_folder(path, *, inner=None, settings=TOKENS, template=CHATML, **files):
    """The tokenizer's part of a Hugging Face folder; `files`: name -> content of more `NAME.json`."""
    path = pathlib.Path(path)
    path.mkdir(parents=True, exist_ok=True)
    (inner or byte_inner()).save(str(path / "tokenizer.json"))
    settings = {**settings, **({"chat_template": template} if template else {})}
    for name, content in {"tokenizer_config": settings, **files}.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def folder(path, *, cfg=None, arrays=None, **tokenizer):
    """A whole Hugging Face folder."""
    cfg = cfg or config()
    path = tokenizer_folder(path, **{"config": cfg, **tokenizer})
    safetensors.numpy.save_file(weights(cfg) if arrays is None else arrays, str(path / "model.safetensors"))
    return path


def base_run(path):
    cfg = get_config()
    cfg.base.source = f"dir:{path}"
    return load_base_run(cfg)


def dataset(rows, path, **changes):
    """`(DataSet, Tokenizer)` of rows in a file of their own beside the tokenizer in `path`."""
    file = pathlib.Path(path) / "d.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg, tokenizer = get_config().data, tokenizer_lib.from_folder(path)
    with cfg.unlocked():
        cfg.update(dict(tasks=f"jsonl:{file}", seq_len=64) | changes)
    return data.build(cfg, tokenizer=tokenizer, batch_size=4, seed=0), tokenizer


def examples(dataset, split="train"):
    return [dataset.splits[split].example(i) for i in range(len(dataset.splits[split].length))]


def talk(*pairs):
    return dict(messages=[dict(role=role, content=content) for role, content in pairs])


GOOD = [talk(("user", f"q{i}"), ("assistant", f"a{i}")) for i in range(40)]
PLAIN = [dict(prompt=f"p{i}", target="t") for i in range(40)]
