"""GGUF files of every architecture beyond llama's: they mean what the Hugging Face folder of the same weights means."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest

from molora_jax.backbones.hf_config import from_hf
from molora_jax.errors import InputError
from molora_jax.io import gguf_arch
from molora_jax.io.base import load_base
from tests.backbones import family_cases
from tests.io import gguf_cases, tiny_files

NAMES = json.loads((pathlib.Path(__file__).parents[1] / "fixtures" / "gguf_names.json").read_text())


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOLORA_CACHE", str(tmp_path / "cache"))


def written(path, arch, added=(), **changes):
    """The GGUF file, and the Hugging Face folder of the same weights; `added`: name -> what its tensor has more."""
    config = gguf_cases.CASES[arch]
    folder = family_cases.write(path / "folder", "folder", config)
    leaves = from_hf(config, where="config.json").shapes().values()
    values = family_cases.tensors(config, {name: leaf.file_shape for leaf in leaves for name, _ in leaf.files()})
    tensors = gguf_cases.tensors(arch, values, config, NAMES)
    for name, change in dict(added).items():
        tensors[name] = tensors[name] + change
    vocabulary = tiny_files.byte_vocabulary()
    metadata = gguf_cases.metadata(arch, config) | {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": vocabulary,
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.token_type": [1] * 256 + [3] * 4 + [1] * (family_cases.V - 260),
        "tokenizer.ggml.eos_token_id": 259,
    }  # fmt: skip
    vocabulary += ["ab", *(f"<x{i}>" for i in range(family_cases.V - 261))]
    raw = {name: (x.shape, "F32", x.tobytes()) for name, x in tensors.items()}
    (path / "m.gguf").write_bytes(tiny_files.gguf_bytes(metadata | changes, raw))
    return f"gguf:{path / 'm.gguf'}", folder


@pytest.mark.parametrize("arch", gguf_cases.CASES)
def test_a_file_means_what_the_folder_means(tmp_path, arch):
    source, folder = written(tmp_path, arch)
    found, wanted = load_base(source), load_base(folder)
    a, b = found.config, wanted.config
    if arch == "phi3":  # its attention factor is written in float32
        assert np.isclose(a.rope_scaling.attention, b.rope_scaling.attention, rtol=1e-6)
        a = dataclasses.replace(a, rope_scaling=b.rope_scaling)
    assert a == b
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-6), found.params, wanted.params)


def test_every_architecture_is_compared():
    assert set(gguf_cases.CASES) | {"llama", "qwen2", "qwen3"} == set(gguf_arch.ARCHITECTURES)


@pytest.mark.parametrize(
    "arch, changes, message",
    [
        ("phi3", {"phi3.attention.sliding_window": 7}, "sliding_window: got 7"),
        ("gemma2", {"gemma2.attention.scale": 2.0}, "attention.scale"),
        ("gpt-oss", {"gpt-oss.rope.scaling.type": "linear"}, "rope.scaling.type"),
        ("gpt-oss", {"gpt-oss.expert_weights_scale": 2.0}, "expert_weights_scale"),
        ("gemma3", {"gemma3.rope.dimension_count": 8}, "rope.dimension_count"),
        ("olmo2", {"olmo2.expert_count": 8}, "an MoE model"),
    ],
)
def test_what_is_refused_by_name(tmp_path, arch, changes, message):
    with pytest.raises(InputError, match=message):
        load_base(written(tmp_path, arch, **changes)[0])
