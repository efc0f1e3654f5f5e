"""Hugging Face folders: the round trip, shards, dtypes, and folders that are refused."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from molora_jax.errors import InputError
from molora_jax.io import tensors
from molora_jax.io.base import load_base
from tests.io import tiny_files

CONFIG = tiny_files.llama_config(tie_word_embeddings=False)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOLORA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    return tiny_files.write_hf_folder(tmp_path / "model", CONFIG, tiny_files.hf_tensors(CONFIG))


def check(base, wanted):
    blocks = base.params["blocks"]
    for i in range(2):
        prefix = f"model.layers.{i}."
        np.testing.assert_array_equal(blocks["down"]["kernel"][i], wanted[prefix + "mlp.down_proj.weight"].T)
        np.testing.assert_array_equal(blocks["attn_norm"][i], wanted[prefix + "input_layernorm.weight"])
    np.testing.assert_array_equal(base.params["head"], wanted["lm_head.weight"].T)
    np.testing.assert_array_equal(base.params["final_norm"], wanted["model.norm.weight"])
    assert set(base.params) == {"embed", "final_norm", "head", "blocks"}
    assert set(blocks) == {"attn_norm", "ffn_norm", "q", "k", "v", "o", "gate", "up", "down"}
    assert all(set(blocks[site]) == {"kernel"} for site in ("q", "o", "gate"))


def test_round_trip_and_the_safetensors_package_agree(folder):
    wanted = tiny_files.hf_tensors(CONFIG)
    base = load_base(f"dir:{folder}")
    check(base, wanted)
    assert base.params["blocks"]["down"]["kernel"].shape == (2, 24, 16)
    theirs = safetensors.numpy.load_file(folder / "model.safetensors")  # our writer, their reader
    assert set(theirs) == set(wanted)
    safetensors.numpy.save_file(wanted, folder / "model.safetensors")  # their writer, our reader
    check(load_base(f"dir:{folder}"), wanted)


def test_shards(folder):
    wanted = tiny_files.hf_tensors(CONFIG)
    (folder / "model.safetensors").unlink()
    names = sorted(wanted)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in parts.items():
        safetensors.numpy.save_file({name: wanted[name] for name in held}, folder / file)
    weight_map = {name: file for file, held in parts.items() for name in held}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    check(load_base(f"dir:{folder}"), wanted)
    index.write_text(json.dumps({"weight_map": {name: "../x.safetensors" for name in names}}))
    with pytest.raises(InputError, match="inside the folder"):
        load_base(f"dir:{folder}")


def test_bfloat16_files_and_dtypes(folder):
    wanted = {name: value.astype(ml_dtypes.bfloat16) for name, value in tiny_files.hf_tensors(CONFIG).items()}
    shapes = {name: value.shape for name, value in wanted.items()}
    tensors.write(folder / "model.safetensors", shapes, ml_dtypes.bfloat16, iter(wanted.values()))
    check(load_base(f"dir:{folder}", dtype="float32"), {n: v.astype(np.float32) for n, v in wanted.items()})
    base = load_base(f"dir:{folder}", dtype="bfloat16")
    assert base.params["embed"].dtype == ml_dtypes.bfloat16
    check(base, wanted)
    with pytest.raises(InputError, match=r"base\.dtype"):
        load_base(f"dir:{folder}", dtype="int8")


def test_digest_follows_the_content_not_the_path(folder, tmp_path):
    first = load_base(f"dir:{folder}").digest
    moved = folder.rename(tmp_path / "elsewhere")
    assert load_base(f"dir:{moved}").digest == first
    assert load_base(f"dir:{moved}", dtype="bfloat16").digest == first
    tiny_files.write_hf_folder(moved, CONFIG, tiny_files.hf_tensors(CONFIG, seed=1))
    assert load_base(f"dir:{moved}").digest != first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type: got 'gpt2'"),
        ({"hidden_size": 32}, "expected a float tensor of shape"),
        ({"num_hidden_layers": 3}, "model.layers.2"),
        ({"num_hidden_layers": 1}, "tensors: got 9 more"),
        ({"num_hidden_layers": 10**30}, "num_hidden_layers"),
        ({"hidden_size": "16"}, "hidden_size: got '16'"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"num_key_value_heads": 3}, "divide the heads"),
        ({"intermediate_size": None}, "intermediate_size: got None"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "factor"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "factor"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "short_factor"),
        ({"rope_scaling": {"rope_type": "proportional"}}, "rope_scaling: got proportional"),
        ({"attention_bias": True}, "q_proj.bias: got no such tensor"),
        ({"attention_bias": 1}, "attention_bias: got 1"),
    ],
)
def test_configs_that_are_refused(folder, change, message):
    (folder / "config.json").write_text(json.dumps({**CONFIG, **change}))
    with pytest.raises(InputError, match=message):
        load_base(f"dir:{folder}")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(folder, bad):
    wanted = tiny_files.hf_tensors(CONFIG)
    wanted["model.layers.1.mlp.up_proj.weight"][3, 4] = bad
    safetensors.numpy.save_file(wanted, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj.*NaN"):
        load_base(f"dir:{folder}")


def test_values_too_large_for_the_dtype(folder):
    wanted = tiny_files.hf_tensors(CONFIG)
    wanted["model.norm.weight"][0] = 1e30
    safetensors.numpy.save_file(wanted, folder / "model.safetensors")
    load_base(f"dir:{folder}", dtype="bfloat16")
    with pytest.raises(InputError, match="infinite in float16"):
        load_base(f"dir:{folder}", dtype="float16")


def test_integer_weights_and_extra_tensors(folder):
    wanted = tiny_files.hf_tensors(CONFIG)
    integers = {**wanted, "model.norm.weight": np.ones(16, np.int32)}
    safetensors.numpy.save_file(integers, folder / "model.safetensors")
    with pytest.raises(InputError, match="int32"):
        load_base(f"dir:{folder}")
    safetensors.numpy.save_file({**wanted, "../../evil": np.ones(1, np.float32)}, folder / "model.safetensors")
    with pytest.raises(InputError, match="tensors: got 1 more"):
        load_base(f"dir:{folder}")


def test_missing_files(folder):
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        load_base(f"dir:{folder}")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="safe_serialization"):
        load_base(f"dir:{folder}")
    (folder / "config.json").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"config\.json: got no JSON"):
        load_base(f"dir:{folder}")
    with pytest.raises(InputError, match=r"config\.json: got No such file"):
        load_base(f"dir:{folder}/nowhere")


def test_a_tokenizer_larger_than_the_model(folder):
    small = tiny_files.llama_config(vocab_size=100, tie_word_embeddings=False)
    tiny_files.write_hf_folder(folder, small, tiny_files.hf_tensors(small))
    with pytest.raises(InputError, match="260 tokens"):
        load_base(f"dir:{folder}")


@pytest.mark.parametrize("side", ["prefix", "suffix"])
def test_ids_that_a_post_processor_adds_have_rows(folder, side):
    """TemplateProcessing may name ids that no vocabulary has: a look-up there would give another token's row."""
    file = json.loads((folder / "tokenizer.json").read_text())
    own, text = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    single = [own, text] if side == "prefix" else [text, own]
    specials = {"<s>": {"id": "<s>", "ids": [999999], "tokens": ["<s>"]}}
    pair = [text, {"Sequence": {"id": "B", "type_id": 1}}]
    file["post_processor"] = dict(type="TemplateProcessing", single=single, pair=pair, special_tokens=specials)
    (folder / "tokenizer.json").write_text(json.dumps(file))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["add_bos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="tokenizer: got .* 999999 .*expected ids below"):
        load_base(f"dir:{folder}")


def test_mutated_and_truncated_safetensors(tmp_path):
    """Nothing but InputError comes out, and views never leave the file."""
    wanted = {"a": np.ones((2, 3), np.float32), "b": np.ones(5, np.float32)}
    content = safetensors.numpy.save(wanted)
    path = tmp_path / "x.safetensors"
    for size in range(len(content)):
        path.write_bytes(content[:size])
        with pytest.raises(InputError, match=r"x\.safetensors"):
            tensors.read(path)
    rng = np.random.default_rng(0)
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(500):
        mutated = bytearray(content)
        for at in rng.integers(0, header, rng.integers(1, 5)):
            mutated[at] = rng.integers(0, 256)
        path.write_bytes(mutated)
        try:
            views = tensors.read(path)
        except InputError:
            continue
        assert sum(view.nbytes for view in views.values()) <= len(content)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 8], "x": 1}, None),
        ({"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}, "inside the file"),
        ({"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}, "natural numbers"),
        ({"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}, "natural numbers"),
        ({"dtype": "F32", "shape": [True, 2], "data_offsets": [0, 8]}, "natural numbers"),
        ({"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}, "dtype 'F8_E4M3'"),
        ({"dtype": [], "shape": [8], "data_offsets": [0, 8]}, "dtype"),
        ({"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}, "without dtype"),
        ([], "without dtype"),
    ],
)
def test_safetensors_headers(tmp_path, entry, message):
    header = json.dumps({"w": entry}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    if message is None:
        assert tensors.read(path)["w"].shape == (2,)
        return
    with pytest.raises(InputError, match=message):
        tensors.read(path)
    shared = json.dumps({name: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for name in "ab"}).encode()
    path.write_bytes(len(shared).to_bytes(8, "little") + shared + bytes(8))
    with pytest.raises(InputError, match="16 declared bytes"):
        tensors.read(path)
