"""GGUF: every block type against the `gguf` package's numbers, whole tiny models, and hostile files."""

import pathlib
import struct

import numpy as np
import pytest

from molora_jax.errors import InputError
from molora_jax.io import gguf, gguf_model, gguf_tokenizer, quants
from molora_jax.io.base import load_base
from molora_jax.io.tokenizer import byte_tokenizer
from tests.io import tiny_files

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOLORA_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("type_id", quants.TYPES)
def test_every_type_equals_the_gguf_package(type_id):
    name, block, block_bytes, _ = quants.TYPES[type_id]
    with np.load(FIXTURES / "gguf_blocks.npz", allow_pickle=False) as fixture:
        raw, expected = fixture[f"{name}_raw"], fixture[name]
    assert raw.shape[1:] == (block_bytes,)
    assert expected.size == len(raw) * block
    found = quants.dequantize(raw, type_id)
    np.testing.assert_array_equal(found.view(np.uint32), expected.reshape(-1).view(np.uint32))  # bit for bit


def test_a_quantised_tensor_keeps_its_rows(tmp_path):
    with np.load(FIXTURES / "gguf_blocks.npz", allow_pickle=False) as fixture:
        raw, expected = fixture["Q4_1_raw"][:2], fixture["Q4_1"][:2]
    path = tmp_path / "t.gguf"
    path.write_bytes(tiny_files.gguf_bytes({"general.name": "x"}, {"w": ((2, 32), "Q4_1", raw.tobytes())}))
    np.testing.assert_array_equal(gguf.read(path).tensor("w"), expected.reshape(2, 32))


@pytest.mark.parametrize(
    ("arch", "changes"),
    [("llama", {}), ("llama", {"tie_word_embeddings": False}), ("qwen2", {}), ("qwen3", {"head_dim": 8})],
)
def test_a_whole_model(tmp_path, arch, changes):
    extra = {"qwen3.attention.key_length": 8} if arch == "qwen3" else {}
    content, wanted = tiny_files.llama_gguf(arch, metadata=extra, **changes)
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    base = load_base(f"gguf:{path}")
    assert base.config.family == arch
    assert base.config.norm_eps == 1e-5
    for i in range(2):
        q = wanted[f"model.layers.{i}.self_attn.q_proj.weight"]
        np.testing.assert_array_equal(base.params["blocks"]["q"]["kernel"][i], q.T)
        k = wanted[f"model.layers.{i}.self_attn.k_proj.weight"]
        np.testing.assert_array_equal(base.params["blocks"]["k"]["kernel"][i], k.T)
        if arch == "qwen2":
            bias = wanted[f"model.layers.{i}.self_attn.q_proj.bias"]
            np.testing.assert_array_equal(base.params["blocks"]["q"]["bias"][i], bias)
    np.testing.assert_array_equal(base.params["embed"], wanted["model.embed_tokens.weight"])
    assert ("head" in base.params) == (not base.config.tied)
    ids = base.tokenizer.encode("<|im_start|>ab!<|im_end|>")
    assert ids[0] == 258
    assert ids[-1] == 259
    assert 260 in ids  # the merge
    again = load_base(f"gguf:{path}", dtype="bfloat16")
    assert again.digest == base.digest
    assert again.params["embed"].dtype.name == "bfloat16"


def test_every_truncation_is_an_input_error(tmp_path):
    content, _ = tiny_files.llama_gguf()
    path = tmp_path / "cut.gguf"
    for size in [*range(0, 400, 7), *np.linspace(400, len(content) - 33, 40).astype(int)]:
        path.write_bytes(content[:size])
        with pytest.raises(InputError, match=r"cut\.gguf"):
            gguf.read(path)


def test_mutated_files_load_or_are_refused(tmp_path):
    """Flipped header bytes never give another error than InputError, and never a large allocation."""
    content, _ = tiny_files.llama_gguf()
    header = len(content) - sum(v.nbytes for v in tiny_files.hf_tensors(tiny_files.llama_config()).values())
    rng = np.random.default_rng(0)
    refused = 0
    for case in range(150):
        mutated = bytearray(content)
        for at in rng.integers(0, header, rng.integers(1, 4)):
            mutated[at] = rng.integers(0, 256)
        path = tmp_path / "mutated.gguf"
        path.write_bytes(mutated)
        try:
            load_base(f"gguf:{path}")
        except InputError:
            refused += 1
        assert not list((tmp_path / "cache").glob("converted/.part-*")), case
    assert refused > 20


def test_huge_declared_sizes_allocate_nothing(tmp_path):
    path = tmp_path / "huge.gguf"
    array = tiny_files.gguf_string("a") + struct.pack("<IIQ", 9, 8, 1 << 60)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + array)
    with pytest.raises(InputError, match="array of"):
        gguf.read(path)
    tensor = tiny_files.gguf_string("t") + struct.pack("<IQQIQ", 2, 1 << 40, 1 << 40, 0, 0)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + tensor)
    with pytest.raises(InputError, match="cut short"):
        gguf.read(path)


@pytest.mark.parametrize(
    ("metadata", "drop", "message"),
    [
        ({"general.architecture": "mamba"}, (), "general.architecture.*'mamba'.*one of llama"),
        ({"tokenizer.ggml.pre": "bloom"}, (), "tokenizer.ggml.pre.*'bloom'"),
        ({"tokenizer.ggml.model": "t5"}, (), "tokenizer.ggml.model.*hf:ORG"),
        ({"tokenizer.ggml.model": "llama"}, (), "tokenizer.ggml.scores"),
        ({"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [1.0]}, (), "tokenizer.ggml.scores: got 1"),
        ({"llama.expert_count": 8}, (), "MoE"),
        ({"llama.rope.scaling.type": "longrope"}, (), "longrope"),
        ({"llama.rope.dimension_count": 2}, (), "rope.dimension_count: got 2"),
        ({"llama.attention.value_length": 2}, (), "attention.value_length: got 2"),
        ({"llama.logit_scale": 0.5}, (), "llama.logit_scale: got 0.5"),
        ({}, ("tokenizer.ggml.pre",), "tokenizer.ggml.pre.*none, or 'default'"),
        ({"llama.attention.causal": False}, (), "llama.attention.causal: got false"),
        ({"llama.attention.causal": 0}, (), "llama.attention.causal: got 0"),
        ({"llama.attention.head_count_kv": [2, 4]}, (), r"head_count_kv: got \[2, 4\]"),
        ({"llama.attention.head_count_kv": [2]}, (), r"head_count_kv: got \[2\]"),
        ({"llama.feed_forward_length": [24.0, 24.0]}, (), "feed_forward_length: got"),
        ({"llama.attention.sliding_window": 8}, (), "llama.attention.sliding_window: got 8"),
        ({"llama.block_count": 3}, (), "blk.2.attn_norm.*no such tensor"),
        ({"llama.block_count": 1}, (), "blk.1"),
        ({"llama.embedding_length": 32}, (), "expected shape"),
        ({"tokenizer.ggml.bos_token_id": 999}, (), "bos_token_id"),
        ({}, ("blk.1.ffn_up.weight",), "blk.1.ffn_up.weight: got no such tensor"),
        ({}, ("llama.attention.layer_norm_rms_epsilon",), "layer_norm_rms_epsilon"),
        ({}, ("token_embd.weight",), "vocab_size|token_embd"),
    ],
)
def test_models_that_are_refused(tmp_path, metadata, drop, message):
    path = tmp_path / "model.gguf"
    path.write_bytes(tiny_files.llama_gguf(metadata=metadata, drop=drop)[0])
    with pytest.raises(InputError, match=message):
        load_base(f"gguf:{path}")


def test_metadata_that_changes_nothing(tmp_path):
    wanted = _config_of(tmp_path, {})
    for metadata in (
        {"llama.attention.causal": True},
        {"llama.attention.head_count_kv": [2, 2]},
        {"llama.feed_forward_length": [24, 24]},
        {"llama.attention.sliding_window": 64},
        {"llama.attention.sliding_window": 0},
    ):
        assert _config_of(tmp_path, metadata) == wanted


def _config_of(tmp_path, metadata):
    path = tmp_path / "model.gguf"
    path.write_bytes(tiny_files.llama_gguf(metadata=metadata)[0])
    return load_base(f"gguf:{path}").config


def test_unknown_tensor_type(tmp_path):
    content = tiny_files.gguf_bytes({"general.name": "x"}, {"w": ((1, 32), "F32", bytes(128))})
    at = content.index(tiny_files.gguf_string("w")) + 9 + 4 + 16
    path = tmp_path / "t.gguf"
    path.write_bytes(content[:at] + struct.pack("<I", 16) + content[at + 4 :])
    with pytest.raises(InputError, match="GGML type 16"):
        gguf.read(path)


def test_llama3_scaling_is_refitted(tmp_path):
    half = 32
    inverse = 500000.0 ** (-np.arange(half) / half)
    smooth = np.clip((8192 * inverse / (2 * np.pi) - 1) / 3, 0, 1)
    divisor = (1 / (smooth + (1 - smooth) / 8)).astype(np.float32)
    path = tmp_path / "rope.gguf"
    path.write_bytes(tiny_files.gguf_bytes({"a": 1}, {"rope_freqs.weight": ((half,), "F32", divisor.tobytes())}))
    scaling = gguf_model._llama3_scaling(gguf.read(path), {"head_dim": 64, "rope_theta": 500000.0})
    assert scaling["factor"] == 8.0
    with pytest.raises(InputError, match="rope scaling"):
        gguf_model._llama3_scaling(gguf.read(path), {"head_dim": 64, "rope_theta": 100.0})


@pytest.mark.parametrize(
    ("metadata", "ends", "prefix"),
    [
        ({}, (259,), ()),
        ({"tokenizer.ggml.eot_token_id": 258, "tokenizer.ggml.eom_token_id": 256}, (259, 258, 256), ()),
        ({"tokenizer.ggml.eos_token_ids": [258, 259]}, (259, 258), ()),
        ({"tokenizer.ggml.add_bos_token": True}, (259,), (257,)),
        ({"tokenizer.ggml.pre": "llama-bpe"}, (259,), (257,)),
        ({"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": False}, (259,), ()),
    ],
)
def test_end_tokens_and_bos(tmp_path, metadata, ends, prefix):
    """As the file says, and through the converted folder, where no template is: the context starts with BOS once."""
    path = tmp_path / "m.gguf"
    path.write_bytes(tiny_files.llama_gguf(metadata=metadata)[0])
    for tok in (gguf_tokenizer.tokenizer(gguf.read(path)), load_base(f"gguf:{path}").tokenizer):
        assert (tok.end_ids, tok.eos_id, tok.prefix_ids) == (ends, 259, prefix)
        ids = tok.encode_chat([dict(role="user", content="hi")], add_generation_prompt=True)
        assert ids[:1] == list(prefix or tok.encode("u")) and ids.count(257) == len(prefix)


T = "tokenizer.ggml."
UNTYPED = {  # what a file says of its 261 tokens, in place of "the last four but one are special"
    "no types": {f"{T}token_type": None},
    "all ordinary": {f"{T}token_type": [1] * 261},
    "ordinary ends": {f"{T}token_type": [1] * 256 + [3, 1, 3, 1, 1]},
    "an ordinary end of a turn": {f"{T}token_type": [1] * 256 + [3, 3, 1, 3, 1], f"{T}eot_token_id": 258},
    "an ordinary end in the list": {f"{T}token_type": [1] * 256 + [3, 3, 1, 3, 1], f"{T}eos_token_ids": [259, 258]},
    "an ordinary pad": {f"{T}token_type": [1] * 256 + [1, 3, 3, 3, 1], f"{T}padding_token_id": 256},
}  # fmt: skip


@pytest.mark.parametrize("name", UNTYPED)
def test_special_ids_are_tokens_whatever_type_the_file_gives_them(tmp_path, name):
    path, text = tmp_path / "m.gguf", "a<|im_start|>b<|im_end|>\n<|bos|><|pad|>ab"
    path.write_bytes(tiny_files.llama_gguf()[0])
    ids = gguf_tokenizer.tokenizer(gguf.read(path)).encode(text)
    assert [i for i in ids if 256 <= i < 260] == [258, 259, 257, 256]
    drop = [key for key, value in UNTYPED[name].items() if value is None]
    path.write_bytes(tiny_files.llama_gguf(metadata=() if drop else UNTYPED[name], drop=drop)[0])
    for tok in (gguf_tokenizer.tokenizer(gguf.read(path)), load_base(f"gguf:{path}").tokenizer):
        assert tok.encode(text) == ids and tok.decode(ids, skip_special_tokens=True) == "ab\nab"


def test_a_pad_that_is_a_letter_stays_one(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(tiny_files.llama_gguf(metadata={f"{T}padding_token_id": 64})[0])
    plain = byte_tokenizer()
    letter = plain.token_text(64)
    for tok in (gguf_tokenizer.tokenizer(gguf.read(path)), load_base(f"gguf:{path}").tokenizer):
        assert tok.decode(tok.encode(f"x{letter}"), skip_special_tokens=True) == f"x{letter}"


def test_the_converted_tokenizer_is_the_files(tmp_path):
    templates = {"tokenizer.chat_template": "{{ messages[0].content }}", "tokenizer.chat_template.tool_use": "tools"}
    more = {f"{T}padding_token_id": 256, f"{T}eot_token_id": 258, f"{T}add_bos_token": True}
    path = tmp_path / "m.gguf"
    path.write_bytes(tiny_files.llama_gguf(metadata=templates | more)[0])
    tok, converted = gguf_tokenizer.tokenizer(gguf.read(path)), load_base(f"gguf:{path}").tokenizer
    assert converted.digest() == tok.digest()
    talk = [dict(role="user", content="hi")]
    assert converted.chat(talk, add_generation_prompt=True) == "hi"
    assert converted.chat(talk, add_generation_prompt=True, tools=[{}]) == "tools"


MISTYPED = {
    f"{T}model": 3, f"{T}pre": 3, f"{T}tokens": [1, 2], f"{T}token_type": "3", f"{T}merges": 1,
    f"{T}add_bos_token": "false", f"{T}eos_token_id": True, f"{T}bos_token_id": "1", f"{T}padding_token_id": 0.5,
    f"{T}eot_token_id": [1], f"{T}unknown_token_id": "x", f"{T}eos_token_ids": "259",
    "tokenizer.chat_template": 7, "tokenizer.chat_template.tool_use": ["a"],
}  # fmt: skip


@pytest.mark.parametrize("key", MISTYPED)
def test_metadata_of_another_type_is_refused_by_its_key(tmp_path, key):
    path = tmp_path / "m.gguf"
    path.write_bytes(tiny_files.llama_gguf(metadata={key: MISTYPED[key]})[0])
    with pytest.raises(InputError, match=f"m.gguf: {key}: got"):
        load_base(f"gguf:{path}")
    assert not list((tmp_path / "cache").glob("converted/[!.]*"))


@pytest.mark.parametrize("bad, dtype", [(np.nan, "float32"), (np.inf, "float32"), (1e30, "float16")])
def test_weights_that_are_not_finite_are_the_files_error(tmp_path, monkeypatch, bad, dtype):
    config = tiny_files.llama_config()
    values = tiny_files.hf_tensors(config)
    values["model.layers.1.mlp.up_proj.weight"][3, 2] = bad
    path = tmp_path / "m.gguf"
    path.write_bytes(tiny_files.gguf_of(config, values))
    with pytest.raises(InputError, match=r"m\.gguf: tensor model\.layers\.1\.mlp\.up_proj\.weight: got NaN or values"):
        load_base(f"gguf:{path}", dtype=dtype)
    assert not list((tmp_path / "cache").glob("converted/*"))


def test_a_tokenizer_larger_than_the_embedding_is_the_files_error(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(tiny_files.llama_gguf(vocab_size=100)[0])
    with pytest.raises(InputError, match=r"m\.gguf: tokenizer: got .* ids below 100"):
        load_base(f"gguf:{path}")
    assert not list((tmp_path / "cache").glob("converted/*"))
