"""What configs and files of Gemma, OLMo2, Phi-3 and gpt-oss say, how they are written again, what is refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from molora_jax.backbones.attention import causal_mask
from molora_jax.backbones.base import BlockContext
from molora_jax.backbones.hf_config import from_hf
from molora_jax.errors import InputError
from molora_jax.io import huggingface
from molora_jax.io.base import load_base
from tests.backbones import family_cases

CASES = family_cases.CASES


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOLORA_CACHE", str(tmp_path / "cache"))


def read(name, **changes):
    config = {key: value for key, value in (CASES[name] | changes).items() if value is not ...}
    return from_hf(config, where="config.json")


def same(ours, others):
    for path in ours.config.shapes():
        a, b = ours.params, others.params
        for key in path.split("/"):
            a, b = a[key], b[key]
        np.testing.assert_array_equal(a, b, path)


@pytest.mark.parametrize("name", ["phi3", "gemma3", "olmo2"])
def test_a_base_is_written_as_it_was_read(tmp_path, name):
    """Tensors that several sites share are whole again."""
    base = load_base(family_cases.write(tmp_path / "m", "folder", CASES[name]))
    (tmp_path / "again").mkdir()
    huggingface.write_base(tmp_path / "again", base)
    files = [safetensors.numpy.load_file(tmp_path / f / "model.safetensors") for f in ("m", "again")]
    assert files[0].keys() == files[1].keys()
    for tensor in files[0]:
        np.testing.assert_array_equal(files[0][tensor], files[1][tensor], tensor)
    same(base, load_base(f"dir:{tmp_path / 'again'}"))


@pytest.mark.parametrize("form", ["language_model.model.", "model.language_model."])
def test_the_text_tower_of_a_gemma_that_sees(tmp_path, form):
    """As the hub has it: text_config inside, a vision tower beside; it is written without that."""
    plain = load_base(family_cases.write(tmp_path / "plain", "folder", CASES["gemma3"]))
    whole = tmp_path / "whole"
    family_cases.write(whole, "folder", CASES["gemma3"])
    inner = {key: value for key, value in CASES["gemma3"].items() if key != "tie_word_embeddings"}
    outer = dict(model_type="gemma3", text_config=inner, vision_config={"hidden_size": 8}, mm_tokens_per_image=256)
    (whole / "config.json").write_text(json.dumps(outer))
    tensors = safetensors.numpy.load_file(whole / "model.safetensors")
    tensors = {name.replace("model.", form, 1): value for name, value in tensors.items()}
    tensors |= dict.fromkeys(("vision_tower.x.weight", "multi_modal_projector.w"), np.ones((2, 2), np.float32))
    safetensors.numpy.save_file(tensors, whole / "model.safetensors")
    seen = load_base(f"dir:{whole}")
    assert seen.config == plain.config and seen.config.family == "gemma3_text"
    same(seen, plain)
    (tmp_path / "again").mkdir()
    huggingface.write_base(tmp_path / "again", seen)
    same(load_base(f"dir:{tmp_path / 'again'}"), plain)


def test_configs_of_the_hub():
    """Gemma 3 4B names few fields; the two forms of its rotary parameters mean the same."""
    short = dict(model_type="gemma3_text", hidden_size=2560, intermediate_size=10240, num_hidden_layers=34)
    short |= dict(rope_scaling=dict(factor=8.0, rope_type="linear"), sliding_window=1024)
    found = from_hf({"model_type": "gemma3", "text_config": short, "vision_config": {}}, where="c")
    assert (found.heads, found.kv_heads, found.head_dim, found.vocab, found.tied) == (8, 4, 256, 262208, True)
    assert (found.rope_base, found.local_base, found.window, found.context) == (1e6, 1e4, 1024, 131072)
    assert found.sliding == tuple(i for i in range(34) if (i + 1) % 6) and found.query_scalar == 256
    nested = dict(
        full_attention=dict(rope_type="linear", factor=8.0, rope_theta=1e6),
        sliding_attention=dict(rope_type="default", rope_theta=1e4),
    )
    assert from_hf({**short, "rope_scaling": None, "rope_parameters": nested}, where="c") == found
    gemma2 = from_hf(dict(model_type="gemma2", vocab_size=256000, hidden_act="gelu_pytorch_tanh"), where="c")
    assert (gemma2.score_cap, gemma2.logit_cap, gemma2.activation) == (50.0, 30.0, "gelu_tanh")
    assert gemma2.sliding == tuple(range(0, 26, 2)) and gemma2.norms == "both"
    larger = dict(sliding_window=4096, sliding_window_size=4096, cache_implementation="hybrid", head_dim=256)
    assert from_hf(dict(model_type="gemma2", vocab_size=256000, **larger), where="c") == gemma2
    code = {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}
    phi = read("phi3, longrope, short", auto_map=code, partial_rotary_factor=0.5, head_dim=16, rope_scaling=dict(
        type="su", short_factor=[1.0] * 4, long_factor=[2.0] * 4))  # fmt: skip
    assert (phi.rotated, phi.rope_scaling.kind, phi.rope_scaling.context) == (8, "longrope", family_cases.S)
    mini = dict(full_attn_mod=1, interpolate_factor=1, lm_head_bias=False, mlp_bias=False, embd_pdrop=0.0, head_dim=16)
    assert read("phi3", partial_rotary_factor=0.75, sliding_window=262144, **mini).rotated == 12
    assert phi.cacheable(3, family_cases.S) and phi.cacheable(family_cases.S + 1, 99)
    assert not phi.cacheable(3, family_cases.S + 1)


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("gemma3", dict(attn_logit_softcapping=50.0), "attn_logit_softcapping"),  # transformers has it and ignores it
        ("gemma3", dict(sliding_window=None), "sliding_window"),
        ("gemma3", dict(rope_local_base_freq=0.5), "rope_local_base_freq"),
        ("gemma3", dict(use_bidirectional_attention=True), "use_bidirectional_attention"),
        ("gemma3", dict(rope_parameters=dict(sliding_attention=dict(rope_type="linear", factor=2.0))), "sliding_att"),
        ("gemma2", dict(query_pre_attn_scalar=0), "query_pre_attn_scalar"),
        ("gemma2", dict(final_logit_softcapping="30"), "final_logit_softcapping"),
        ("gemma2", dict(hidden_activation="mish"), "hidden_activation"),
        ("olmo2", dict(clip_qkv=8.0), "clip_qkv"),
        ("phi3", dict(partial_rotary_factor=0.3), "partial_rotary_factor"),
        ("phi3", dict(partial_rotary_factor=True), "partial_rotary_factor"),
        ("phi3, longrope, long", dict(partial_rotary_factor=1.0), "short_factor"),
    ],
)
def test_what_is_refused_by_name(name, changes, message):
    with pytest.raises(InputError, match=message):
        read(name, **changes)


def test_a_vision_model_without_a_text_tower_is_refused():
    with pytest.raises(InputError, match="text_config"):
        from_hf({"model_type": "gemma3", "vision_config": {}}, where="c")


def test_a_norm_that_starts_as_one_leaves_sizes_alone():
    """Random weights of a family whose norms multiply with 1 + weight start at 0."""
    for name, fill in (("gemma2", 0.0), ("olmo2", 1.0)):
        leaves = dataclasses.replace(read(name)).shapes()
        assert {leaf.fill for path, leaf in leaves.items() if "norm" in path} == {fill}


def test_a_prompts_scores_have_the_scale_of_the_bases_own():
    """`attend_prompt` divides by the root of the head's width; Gemma divides by the root of `query_pre_attn_scalar`."""
    decoder = read("gemma2")
    size, scalar = decoder.head_dim, decoder.query_scalar
    assert scalar != size
    seen = {}

    class Adapt:
        def attention(self, h, weights, core):
            return core(*(h @ weights[site][0] for site in "qkv"))

        def prompted(self, out, q, weights, keys):
            seen["q"] = q
            return out

    @jax.jit
    def turned(h):
        p, ones = {site: {"kernel": jnp.ones(decoder.dims(site))} for site in "qkvo"}, jnp.ones((1, 3), jnp.int32)
        once = decoder.once(jnp.arange(3)[None], causal_mask(ones), cached=False)
        at = BlockContext(once, {"slides": jnp.bool_(False)}, ones > 0, False, "xla")
        decoder._attention(p, h, at, Adapt(), None)
        return seen["q"]

    q = np.asarray(turned(np.ones((1, 3, decoder.width), np.float32)))
    norm = np.linalg.norm(q, axis=-1)  # turning keeps it
    np.testing.assert_allclose(norm * size**-0.5, decoder.width * size**0.5 * scalar**-0.5, rtol=1e-5)
