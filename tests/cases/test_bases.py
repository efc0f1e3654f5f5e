"""Bases as people have them: what configs and files say beyond the plain case is used, or refused by name."""

import json

import numpy as np
import pytest

from molora_jax.backbones.hf_config import from_hf
from molora_jax.errors import InputError
from molora_jax.evaluation.run import load_base_run
from molora_jax.io.base import load_base
from tests.io import tiny_files
from tests.tiny import tiny_config


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOLORA_CACHE", str(tmp_path / "cache"))


def config(**changes):
    return tiny_files.llama_config(max_position_embeddings=512, **changes)


def read(**changes):
    return from_hf(config(**changes), where="config.json")


def folder(path, **changes):
    c = config(**changes)
    return tiny_files.write_hf_folder(path, c, tiny_files.hf_tensors(c))


CHANGES_THE_NUMBERS = {
    "partial_rotary_factor": 0.5, "rotary_dim": 2, "rotary_pct": 0.25, "rope_interleaved": True, "alibi": True,
    "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 256,
    "attention_multiplier": 0.1, "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 8.0,
    "logit_scale": 0.0625, "scale_emb": 12, "clip_qkv": 8.0, "use_qk_norm": True, "qk_layernorm": True,
    "no_rope_layers": [1, 1, 0], "attention_chunk_size": 128, "num_local_experts": 8, "num_experts": 64,
    "quantization_config": {"bits": 4}, "mlp_bias": True, "is_causal": False, "use_bidirectional_attention": True,
    "num_hidden_layers": 2_000_000_000,
    "some_new_rope_thing": {"a": 1}, "my_logit_multiplier": 3.0, "weird_bias": True, "window_of_layers": [64, 0],
    "layer_types": ["linear_attention", "full_attention"], "auto_map": {"AutoModelForCausalLM": "modeling.My"},
    "hidden_act": "mish", "head_dim": 5, "tie_word_embeddings": "yes", "rope_theta": 0.5,
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES_THE_NUMBERS)
def test_a_field_that_changes_the_numbers_is_refused_by_name(name):
    with pytest.raises(InputError, match="heads" if name == "head_dim" else name):
        read(**{name: CHANGES_THE_NUMBERS[name]})


def test_off_harmless_and_unknown_fields():
    notes = []
    off = {"partial_rotary_factor": 1.0, "rotary_dim": 4, "alibi": False, "attn_logit_softcapping": None,
           "logits_scaling": 1.0, "quantization_config": None, "num_experts": 0, "attention_bias": False,
           "layer_types": ["full_attention"] * 2, "query_pre_attn_scalar": 4, "residual_multiplier": 1,
           "attention_multiplier": 0.5, "no_rope_layers": [1, 1]}  # fmt: skip
    harmless = {"use_cache": True, "torch_dtype": "bfloat16", "pretraining_tp": 2, "auto_map": {"AutoConfig": "c.C"}}
    strange = {"x_note": "hi", "deep": [[[]]]}
    found = from_hf(config(**off, **harmless, **strange), where="config.json", note=notes.append)
    assert found == read()
    assert notes == ["config.json: not read: x_note, deep"]
    for name, value in dict(attention_multiplier=1.0, softmax_scale=0.5001, no_rope_layers=[1, True]).items():
        with pytest.raises(InputError, match=name):  # 1.0 is not the usual 1 / sqrt(4)
            read(**{name: value})


@pytest.mark.parametrize(
    "scaling, message",
    [
        ({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0, 2.0]}, "short_factor"),
        ({"rope_type": "su", "short_factor": [1.0, 2.0], "long_factor": [1.0, "2"]}, "long_factor"),
        ({"rope_type": "dynamic", "factor": 0.5}, "rope_scaling.factor"),
        ({"type": "linear"}, "rope_scaling.factor"),
        ({"type": "linear", "factor": -1.0}, "factor"),
        ({"type": "linear", "factor": 2.0, "mrope_section": [1, 1]}, "mrope_section"),
        ({"type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0}, "high_freq_factor"),
        ({"type": "yarn", "factor": 4.0, "truncate": "no"}, "truncate"),
        ({"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_type": "linear"}}, "several kinds"),
        ([1], "an object or null"),
    ],
)
def test_rotary_scaling_that_is_refused(scaling, message):
    with pytest.raises(InputError, match=message):
        read(rope_scaling=scaling)


def test_rope_theta_inside_wins_and_two_that_differ_are_refused():
    inside = dict(rope_type="default", rope_theta=5e5)
    assert read(rope_parameters=inside).rope_base == read(rope_scaling=inside).rope_base == 5e5
    assert read(rope_parameters={"full_attention": inside}).rope_base == 5e5
    dynamic, plain = read(rope_scaling=dict(type="dynamic", factor=4.0)), read()
    assert dynamic.rope_scaling.context == plain.context and dynamic.context == 4 * plain.context
    assert dynamic.cacheable(1, plain.context) and not dynamic.cacheable(1, plain.context + 1)
    assert read(rope_scaling=dict(type="linear", factor=1.0)).rope_scaling is None
    with pytest.raises(InputError, match="rope_parameters.factor: got 4.0; expected 2.0"):
        read(rope_scaling=dict(type="linear", factor=2.0), rope_parameters=dict(rope_type="linear", factor=4.0))


LINEAR, OLDER = dict(rope_type="linear", factor=2.0), dict(type="linear", factor=2.0)


@pytest.mark.parametrize(
    "fields",
    [
        dict(rope_theta=77.0, rope_parameters=LINEAR | dict(rope_theta=77.0)),
        dict(rope_theta=77.0, rope_parameters=dict(rope_theta=77)),
        dict(rope_theta=99.0, rope_scaling=OLDER | dict(rope_theta=77.0), rope_parameters=LINEAR | dict(rope_theta=77)),
        dict(rope_theta=99.0, rope_scaling={}, rope_parameters=LINEAR | dict(rope_theta=77.0)),
        dict(rope_theta=77.0, rope_parameters={"full_attention": LINEAR}),
    ],
)
def test_two_rotary_objects_that_agree_are_read(fields):
    found = read(**dict(rope_scaling=OLDER) | fields)
    assert (found.rope_base, found.rope_scaling.kind, found.rope_scaling.factor) == (77.0, "linear", 2.0)


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(rope_theta=99.0, rope_parameters=LINEAR | dict(rope_theta=77.0)), "rope_theta: got 77.0; expected 99.0"),
        (dict(rope_theta=None, rope_parameters=LINEAR | dict(rope_theta=77.0)), "rope_theta: got 77.0; expected 1000"),
        (dict(rope_parameters=dict(rope_type="default")), "rope_type: got default; expected linear"),
        (dict(rope_parameters=LINEAR | dict(beta_fast=32)), "beta_fast: got 32; expected nothing"),
        (dict(rope_scaling=OLDER | dict(rope_type="yarn")), "rope_scaling.type: got linear; expected yarn"),
    ],
)
def test_two_rotary_objects_that_contradict_each_other_are_refused(fields, message):
    """transformers would read rope_scaling alone."""
    with pytest.raises(InputError, match=message):
        read(**dict(rope_scaling=OLDER) | fields)


def test_gemma_3_reads_both_rotary_objects():
    """As transformers does there: rope_scaling is for the full layers, over their parameters."""
    inside = dict(full_attention=dict(rope_theta=77.0), sliding_attention=dict(rope_type="default", rope_theta=50.0))
    fields = dict(model_type="gemma3_text", head_dim=8, query_pre_attn_scalar=8, hidden_activation="gelu_pytorch_tanh")
    found = read(**fields, rope_theta=None, rope_scaling=OLDER, rope_parameters=inside)
    assert (found.rope_base, found.local_base, found.rope_scaling.factor) == (77.0, 50.0, 2.0)
    with pytest.raises(InputError, match="rope_parameters.factor: got 3.0; expected 2.0"):
        inside["full_attention"] = dict(rope_type="linear", factor=3.0)
        read(**fields, rope_scaling=OLDER, rope_parameters=inside)


def test_which_layers_slide():
    full = read(model_type="mistral", sliding_window=None)
    assert read(model_type="mistral", sliding_window=4096) == read(model_type="mistral", sliding_window=512) == full
    short = read(model_type="mistral", sliding_window=64)
    assert (short.context, short.window, short.sliding) == (512, 64, (0, 1))
    slides = dict(model_type="qwen2", use_sliding_window=True, sliding_window=64)
    assert read(**slides, max_window_layers=2).window is None
    assert read(**slides).window is None  # max_window_layers is 28 where nothing is said
    assert read(**slides, max_window_layers=1).sliding == (1,) and read(**slides, max_window_layers=0).sliding == (0, 1)
    assert read(**slides, layer_types=["full_attention"] * 2).window is None
    assert read(**slides, layer_types=["sliding_attention", "full_attention"]).sliding == (0,)
    assert read(model_type="qwen2", use_sliding_window=False, sliding_window=64).window is None
    assert read(sliding_window=64) == read()  # a llama does not read it
    for wrong in (dict(layer_types=["sliding_attention"] * 2), dict(use_sliding_window=1), dict(layer_types=[3])):
        with pytest.raises(InputError, match=next(iter(wrong))):
            read(model_type="qwen3", **wrong)


def test_generation_beyond_a_window_is_the_same_with_and_without_a_cache(tmp_path):
    """Prompt and answer are many times the window; keys that fell out of it are not seen."""
    run = tiny_config("lora")
    answers = {}
    for window in (8, None):
        with run.unlocked():
            run.base.source = f"dir:{folder(tmp_path / str(window), model_type='mistral', sliding_window=window)}"
        base = load_base_run(run)
        answers[window] = base.generate("A long enough prompt.", max_new_tokens=12)
        if window:
            assert answers[window] == base.generate("A long enough prompt.", max_new_tokens=12, cache=False)
    assert answers[8] != answers[None]


def test_what_transformers_takes_where_a_field_is_missing():
    bare = {"model_type": "mistral", "num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 8,
            "num_attention_heads": 16, "vocab_size": 10}  # fmt: skip
    found = from_hf(bare, where="c")
    assert (found.kv_heads, found.context, found.window, found.norm_eps) == (8, 131072, 4096, 1e-6)
    assert from_hf({**bare, "model_type": "qwen3", "num_key_value_heads": 2}, where="c").head_dim == 128


def test_a_head_of_its_own_in_a_tied_model_is_used(tmp_path, capsys):
    c = config()
    own = tiny_files.hf_tensors(config(tie_word_embeddings=False), seed=3)
    base = load_base(f"dir:{tiny_files.write_hf_folder(tmp_path / 'own', c, own)}")
    assert not base.config.tied
    np.testing.assert_array_equal(base.params["head"], own["lm_head.weight"].T)
    assert "lm_head.weight differs" in capsys.readouterr().err
    copy = {**own, "lm_head.weight": own["model.embed_tokens.weight"].copy()}
    base = load_base(f"dir:{tiny_files.write_hf_folder(tmp_path / 'copy', c, copy)}")
    assert base.config.tied and "head" not in base.params


def test_ids_are_checked_against_the_embedding_not_counted(tmp_path):
    """260 tokens, but one has id 300: their number fits 261 rows, the id does not."""
    path = folder(tmp_path / "m") / "tokenizer.json"
    text = json.loads(path.read_text())
    (last,) = [token for token in text["added_tokens"] if token["content"] == "<|im_end|>"]
    last["id"] = 300
    vocabulary = text["model"]["vocab"]
    vocabulary.pop("<|im_end|>", None)
    vocabulary["<|im_end|>"] = 300
    path.write_text(json.dumps(text))
    with pytest.raises(InputError, match=r"<\|im_end\|>' with id 300.*ids below 261"):
        load_base(f"dir:{path.parent}")


@pytest.mark.parametrize(
    "metadata, kind",
    [
        ({"scaling.factor": 4.0}, "linear"),
        ({"scale_linear": 4.0}, "linear"),
        ({"scaling.type": "linear", "scaling.factor": 4.0}, "linear"),
        ({"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 128}, "yarn"),
        ({"scaling.type": "none", "scaling.factor": 4.0}, None),
        ({}, None),
    ],
)
def test_gguf_rotary_scaling_in_all_its_forms(tmp_path, metadata, kind):
    path = tmp_path / "m.gguf"
    path.write_bytes(tiny_files.llama_gguf(metadata={f"llama.rope.{key}": v for key, v in metadata.items()})[0])
    scaling = load_base(f"gguf:{path}").config.rope_scaling
    assert (scaling and scaling.kind) == kind and (scaling is None or scaling.factor == 4.0)


def parts(tmp_path, *, seconds=("blk.1.ffn_up.weight", "blk.1.ffn_down.weight"), said=(2, 2), total=20):
    """A model in two files; returns its Hugging Face tensors."""
    c = tiny_files.llama_config()
    values = tiny_files.hf_tensors(c)
    for i in range(2):
        split = {"split.no": i, "split.count": said[i], "split.tensors.count": total}
        content = tiny_files.gguf_of(c, values, metadata=split, keep=lambda name, i=i: (name in seconds) == bool(i))
        (tmp_path / f"m-{i + 1:05d}-of-00002.gguf").write_bytes(content)
    return values


def test_gguf_in_parts_is_read_by_any_of_them(tmp_path):
    values = parts(tmp_path)
    digests = set()
    for i in (1, 2):
        base = load_base(f"gguf:{tmp_path}/m-{i:05d}-of-00002.gguf")
        up = values["model.layers.1.mlp.up_proj.weight"]
        np.testing.assert_array_equal(base.params["blocks"]["up"]["kernel"][1], up.T)
        digests.add(base.digest)
    assert len(digests) == 1
    (tmp_path / "m-00002-of-00002.gguf").rename(tmp_path / "elsewhere.gguf")
    with pytest.raises(InputError, match="part 2 of 2: got No such file.*all parts in one folder"):
        load_base(f"gguf:{tmp_path}/m-00001-of-00002.gguf")
    with pytest.raises(InputError, match="split.count: got part 1.*of 2.*part 0 of 1, as the file's name says"):
        load_base(f"gguf:{tmp_path}/elsewhere.gguf")


@pytest.mark.parametrize(
    "options, message", [(dict(said=(2, 3)), "of 3 in its metadata"), (dict(total=21), "20 tensors in 2 parts")]
)
def test_gguf_parts_that_do_not_belong_together(tmp_path, options, message):
    parts(tmp_path, **options)
    with pytest.raises(InputError, match=message):
        load_base(f"gguf:{tmp_path}/m-00001-of-00002.gguf")


def test_gguf_without_a_pre_tokenizer_is_known_by_its_architecture_or_refused(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(tiny_files.llama_gguf("qwen2", drop=("tokenizer.ggml.pre",))[0])
    said = tmp_path / "said.gguf"
    said.write_bytes(tiny_files.llama_gguf("qwen2", metadata={"tokenizer.ggml.pre": "qwen2"})[0])
    text = "It's 1234 o'clock,  caf\u0065\u0301\n\n"
    assert load_base(f"gguf:{path}").tokenizer.encode(text) == load_base(f"gguf:{said}").tokenizer.encode(text)
    path.write_bytes(tiny_files.llama_gguf("llama", drop=("tokenizer.ggml.pre",))[0])
    with pytest.raises(InputError, match="tokenizer.ggml.pre: got \"none, or 'default'\".*hf:ORG/NAME"):
        load_base(f"gguf:{path}")
