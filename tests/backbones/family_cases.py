"""Tiny random checkpoints of every family, for an oracle and for us: configs, weights by seed, files of each reader.

Used by `tests/fixtures/make_families.py` (transformers) and by `tests/backbones/parity.py` (ours); numpy alone. Outputs
are compared in random projections, so that the fixture is small: an error of the whole array shows in them.

One checkpoint of every family (ADAPTED) is also compared with LoRA factors on all its sites: logits, loss and the
gradient of every A and B.
"""

import json
import re
import zlib

import numpy as np
import safetensors.numpy

L, D, F, H, K, V, S = 2, 48, 80, 4, 2, 272, 24
SITES = {
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip
ORDER = (
    "model.embed_tokens", "model.norm", "lm_head", "input_layernorm", "post_attention_layernorm", *SITES.values(),
    "self_attn.q_norm", "self_attn.k_norm",
)  # fmt: skip
READERS = ("folder", "shards", "gguf")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def config(family="llama", **changes):
    common = dict(
        model_type=family, num_hidden_layers=L, hidden_size=D, intermediate_size=F, num_attention_heads=H,
        num_key_value_heads=K, vocab_size=V, max_position_embeddings=128, rms_norm_eps=1e-5, rope_theta=10000.0,
        tie_word_embeddings=True, hidden_act="silu", initializer_range=0.02, torch_dtype="float32",
        architectures=[family.capitalize() + "ForCausalLM"],
    )  # fmt: skip
    own = {"mistral": dict(sliding_window=None), "qwen2": dict(use_sliding_window=False), "qwen3": dict(head_dim=16)}
    own["smollm3"] = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)  # its defaults lie beyond a tiny vocabulary
    own["phi3"] = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    own["gemma2"] = dict(
        head_dim=16, query_pre_attn_scalar=20, attn_logit_softcapping=2.0, final_logit_softcapping=3.0,
        hidden_activation="gelu_pytorch_tanh",
    )  # fmt: skip
    own["gemma3_text"] = dict(
        head_dim=16, query_pre_attn_scalar=20, hidden_activation="gelu_pytorch_tanh", sliding_window_pattern=2,
        rope_theta=5000.0, rope_local_base_freq=100.0,
    )  # fmt: skip
    return {key: value for key, value in {**common, **own.get(family, {}), **changes}.items() if value is not ...}


_LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
_LONGROPE = dict(type="longrope", short_factor=[1.0, 1.3, 2.0], long_factor=[1.5, 4.0, 9.0])
_YARN = dict(type="yarn", factor=4.0, original_max_position_embeddings=32)
MAIN = {
    f"{family}, {form}": config(family, tie_word_embeddings=form == "tied")
    for family in FAMILIES
    for form in ("tied", "untied")
}
KINDS = {  # what a config may say beyond its family
    "rope_theta inside": config(rope_theta=10000.0, rope_parameters=dict(rope_type="default", rope_theta=500.0)),
    "rope linear": config(rope_scaling=dict(type="linear", factor=4.0)),
    "rope llama3": config("llama", rope_scaling=_LLAMA3 | dict(original_max_position_embeddings=16)),
    "rope llama3, 8192": config(
        rope_scaling=_LLAMA3 | dict(original_max_position_embeddings=8192), max_position_embeddings=16384
    ),
    "rope dynamic": config(rope_scaling=dict(type="dynamic", factor=4.0)),
    "rope dynamic, beyond the context": config(
        rope_scaling=dict(rope_type="dynamic", factor=3.0), max_position_embeddings=16
    ),
    "rope yarn": config("qwen2", rope_scaling=_YARN),
    "rope yarn, mscale": config(rope_scaling=_YARN | dict(mscale=1.0, mscale_all_dim=0.5, truncate=False, beta_fast=8)),
    "rope yarn, attention_factor": config(rope_parameters=_YARN | dict(attention_factor=1.3, rope_theta=500.0)),
    "sliding window of the rows' length": config("mistral", sliding_window=S),
    "sliding window (mistral)": config("mistral", sliding_window=7),
    "sliding window from layer 1 (qwen2)": config(
        "qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
    "sliding window by layer_types (qwen3)": config(
        "qwen3", use_sliding_window=True, sliding_window=5, layer_types=["sliding_attention", "full_attention"]
    ),
    "sliding window without positions (smollm3)": config(
        "smollm3", use_sliding_window=True, sliding_window=5, no_rope_layers=[0, 1]
    ),
    "attention_bias (llama)": config(attention_bias=True),
    "attention_bias (qwen3)": config("qwen3", attention_bias=True),
    "smollm3": config("smollm3", no_rope_layers=[0, 1]),
    "smollm3, no positions in every second layer": config(
        "smollm3", no_rope_layer_interval=2, attention_bias=True, tie_word_embeddings=False
    ),
    "olmo2": config("olmo2", tie_word_embeddings=False, pad_token_id=0, eos_token_id=1),
    "phi3": config("phi3", tie_word_embeddings=False, sliding_window=7),
    "phi3, longrope, short": config(
        "phi3", rope_scaling=_LONGROPE, original_max_position_embeddings=S, partial_rotary_factor=0.5
    ),
    "phi3, longrope, long": config(
        "phi3", rope_scaling=_LONGROPE, original_max_position_embeddings=16, partial_rotary_factor=0.5
    ),
    "gemma": config("gemma", head_dim=16, num_key_value_heads=1, hidden_act="gelu"),
    "gemma2": config("gemma2", sliding_window=7),
    "gemma2, no caps, both layers full": config(
        "gemma2", attn_logit_softcapping=None, final_logit_softcapping=None, layer_types=["full_attention"] * 2
    ),
    "gemma3": config("gemma3_text", sliding_window=7, rope_scaling=dict(rope_type="linear", factor=8.0)),
    "gemma3, parameters by kind of layer": config(
        "gemma3_text",
        sliding_window=128,
        sliding_window_pattern=...,
        rope_theta=...,
        rope_local_base_freq=...,
        layer_types=["full_attention", "sliding_attention"],
        final_logit_softcapping=4.0,
        attention_bias=True,
        rope_parameters=dict(
            full_attention=dict(rope_type="default", rope_theta=3000.0),
            sliding_attention=dict(rope_type="default", rope_theta=100.0),
        ),
    ),
    "gelu": config(hidden_act="gelu"),
    "gelu_new": config(hidden_act="gelu_new"),
    "relu": config(hidden_act="relu"),
}
CASES = MAIN | KINDS
ROUTED = {  # compared alone in `backbone_cases.py`
    "gpt_oss": config(
        "gpt_oss",
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        intermediate_size=24,
        sliding_window=7,
        attention_bias=True,
        tie_word_embeddings=False,
        rope_scaling=dict(_YARN, original_max_position_embeddings=16, truncate=False),
    ),
}
ALL = CASES | ROUTED
ADAPTED = (  # one checkpoint of every family, each with what is its own
    "llama, untied", "rope llama3", "rope dynamic, beyond the context", "sliding window (mistral)",
    "sliding window from layer 1 (qwen2)", "sliding window by layer_types (qwen3)", "smollm3",
    "gemma", "gemma2", "gemma3", "olmo2", "phi3", "phi3, longrope, long", "gpt_oss",
)  # fmt: skip
R = 2  # rank of the factors; their scale is 1
IN_GGUF = (*MAIN, "rope linear", "rope llama3, 8192", "rope yarn", "attention_bias (llama)", "attention_bias (qwen3)")


def tensors(c: dict, shapes: dict) -> dict:
    """Hugging Face name -> float32 array, by the case's own seed; logits of order 1.

    `shapes`: of every tensor by its name, as the oracle's model or our backbone says them: a family needs no line here.
    """
    rng, made = np.random.default_rng(zlib.crc32(json.dumps(c, sort_keys=True).encode())), {}
    for name in sorted(shapes, key=_place):
        shape = tuple(shapes[name])
        x, scale = rng.standard_normal(shape), 1.0 if "embed" in name else 0.7 * shape[-1] ** -0.5
        wide = 6 if "gate_up" in name else 0.3  # gpt-oss clamps
        value = wide * x if name.endswith("bias") else 1 + 0.2 * x if len(shape) == 1 else scale * x
        made[name] = value.astype(np.float32)
    return made


def _place(name):
    """The order in which tensors are drawn, so that the fixture stays: what ORDER does not know comes last, by name."""
    layer, stem = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?(.*)\.\w+", name).groups()
    known = ORDER.index(stem) if stem in ORDER else len(ORDER)
    return -1 if layer is None else int(layer), known, stem, name.endswith("bias"), name


def sites_of(c: dict) -> dict:
    """Site -> (module of a layer, the rows of its weight that are the site's; None: all)."""
    found = {site: (name, None) for site, name in SITES.items() if c["model_type"] != "gpt_oss" or site in "qkvo"}
    if c["model_type"] == "phi3":
        cuts = (0, D, D + K * D // H, D + 2 * K * D // H)
        found |= {site: ("self_attn.qkv_proj", (cuts[i], cuts[i + 1])) for i, site in enumerate("qkv")}
        found |= {site: ("mlp.gate_up_proj", (i * F, i * F + F)) for i, site in enumerate(("gate", "up"))}
    return found


def factors(c: dict, dims) -> dict:
    """`{site: {"A": [L, R, D_in], "B": [L, R, D_out]}}`, float32; `dims(site)` gives the widths. The layer adds
    `B^T A x` to the site."""
    rng = np.random.default_rng(zlib.crc32(b"factors" + json.dumps(c, sort_keys=True).encode()))
    draw = lambda width, scale: (scale * rng.standard_normal((L, R, width))).astype(np.float32)  # noqa: E731
    return {
        site: {"A": draw(dims(site)[0], dims(site)[0] ** -0.5), "B": draw(dims(site)[1], 0.3)} for site in sites_of(c)
    }


def rows():
    """Token ids and targets `[2, S]`, the same for all cases."""
    rng = np.random.default_rng(7)
    return rng.integers(0, V, (2, S)).astype(np.int32), rng.integers(0, V, (2, S)).astype(np.int32)


def project(array, *, seed: int):
    """`[..., M, N]` -> `[..., 4, 4]` by fixed random matrices with columns of norm 1 or so."""
    rng = np.random.default_rng(seed)
    left, right = (rng.standard_normal((n, 4)) / n**0.5 for n in array.shape[-2:])
    return np.einsum("...mn,mi,nj->...ij", array.astype(np.float64), left, right)


def summary(logits, loss, gradients) -> dict:
    """What is stored and compared, float32. `logits [2, S, V]`; `gradients` by site, `[L, D_in, D_out]`."""
    out = {"logits": project(logits, seed=1), "loss": loss} | {s: project(gradients[s], seed=2) for s in SITES}
    return {name: np.asarray(value, np.float32) for name, value in out.items()}


def adapted_summary(logits, loss, gradients) -> dict:
    """`gradients`: site -> {"A": [L, R, D_in], "B": [L, R, D_out]}."""
    out = {"logits": project(logits, seed=1), "loss": loss}
    out |= {f"{site}/{name}": project(g, seed=3) for site, pair in gradients.items() for name, g in pair.items()}
    return {name: np.asarray(value, np.float32) for name, value in out.items()}


SHAPES = {"logits": (2, 4, 4), "loss": ()} | {site: (L, 4, 4) for site in SITES}


def pack(parts: dict):
    return np.concatenate([parts[name].reshape(-1) for name in SHAPES])


def unpack(row) -> dict:
    cuts = np.cumsum([int(np.prod(shape)) for shape in SHAPES.values()])[:-1]
    return {name: part.reshape(SHAPES[name]) for name, part in zip(SHAPES, np.split(row, cuts), strict=True)}


def write(folder, reader: str, c: dict) -> str:
    """The checkpoint as files of one reader; the source string."""
    from molora_jax.backbones.hf_config import from_hf  # the oracle's environment has no product
    from tests.io import tiny_files

    leaves = from_hf(c, where="config.json").shapes().values()
    values = tensors(c, {name: leaf.file_shape for leaf in leaves for name, _ in leaf.files()})
    if reader == "gguf":
        (folder / "m.gguf").write_bytes(tiny_files.gguf_of(c, values, metadata=_gguf_rope(c)))
        return f"gguf:{folder}/m.gguf"
    tiny_files.write_hf_folder(folder, c, values)
    if reader == "shards":
        (folder / "model.safetensors").unlink()
        places = {name: f"model-{i % 2 + 1:05d}-of-00002.safetensors" for i, name in enumerate(sorted(values))}
        for file in set(places.values()):
            safetensors.numpy.save_file({n: t for n, t in values.items() if places[n] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return f"dir:{folder}"


def _gguf_rope(c):
    """Rotary scaling as llama.cpp's converter writes it."""
    scaling, key = c.get("rope_scaling") or {}, f"{c['model_type']}.rope.scaling."
    kind = scaling.get("type")
    if kind == "linear":
        return {key + "type": "linear", key + "factor": scaling["factor"]}
    if kind == "yarn":
        context = scaling["original_max_position_embeddings"]
        return {key + "type": "yarn", key + "factor": scaling["factor"], key + "original_context_length": context}
    return {}
