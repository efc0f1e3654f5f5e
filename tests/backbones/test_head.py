"""An output head of its own: `lm_head.weight [V, D]` of every reader becomes `[D, V]`; where V = D, too."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from molora_jax import sharding
from molora_jax.backbones.model import Model
from molora_jax.backbones.sizes import base_shapes
from molora_jax.io.base import load_base
from molora_jax.objectives.lm import lm
from tests.io import tiny_files

SQUARE = dict(hidden_size=264, vocab_size=264, num_attention_heads=4, num_key_value_heads=2)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOLORA_CACHE", str(tmp_path / "cache"))


def write(tmp_path, reader, **changes):
    """A source of two random layers, and the Hugging Face tensors it holds."""
    changes = {"tie_word_embeddings": False, **changes}
    if reader == "gguf":
        content, tensors = tiny_files.llama_gguf(**changes)
        (tmp_path / "m.gguf").write_bytes(content)
        return f"gguf:{tmp_path}/m.gguf", tensors
    config = tiny_files.llama_config(**changes)
    tensors = tiny_files.hf_tensors(config)
    folder = tiny_files.write_hf_folder(tmp_path / "m", config, tensors)
    if reader == "shards":
        (folder / "model.safetensors").unlink()
        places = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(sorted(tensors))}
        for file in set(places.values()):
            safetensors.numpy.save_file({n: t for n, t in tensors.items() if places[n] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return f"dir:{folder}", tensors


@pytest.mark.parametrize("changes", [{}, SQUARE], ids=["V > D", "V = D"])
@pytest.mark.parametrize("reader", ["folder", "shards", "gguf"])
def test_logits_are_lm_head_times_hidden(tmp_path, reader, changes):
    source, tensors = write(tmp_path, reader, **changes)
    base = load_base(source)
    D, V = base.config.width, base.config.vocab
    assert base.params["head"].shape == base_shapes(base.config)["head"].shape == (D, V)
    hidden = np.random.default_rng(0).standard_normal((2, 3, D)).astype(np.float32)
    with jax.default_matmul_precision("highest"):
        logits = Model(base.config).logits(base.params, hidden)
    np.testing.assert_allclose(logits, hidden @ tensors["lm_head.weight"].T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mesh", [dict(fsdp=4), dict(tensor=2), dict(fsdp=2, tensor=2)])
def test_over_fsdp_and_tensor(tmp_path, mesh):
    """Each device holds a part of V, and loss and gradient are those of one device."""
    base = load_base(write(tmp_path, "folder", vocab_size=264)[0])
    sizes = dict.fromkeys(sharding.AXES, 1) | mesh
    ways = int(np.prod(list(sizes.values())))
    devices = sharding.make_mesh(sizes, jax.devices()[:ways])
    params = sharding.put(base.params, sharding.param_shardings(base.config, base.params, devices))
    assert params["head"].addressable_shards[0].data.shape == (16, 264 // ways)
    rng = np.random.default_rng(0)
    batch = dict(targets=rng.integers(0, 264, (4, 5)).astype(np.int32), loss_weight=np.ones((4, 5), np.float32))
    hidden = rng.standard_normal((4, 5, 16)).astype(np.float32)
    loss = jax.jit(jax.value_and_grad(lambda h, p: lm(Model(base.config), p, h, batch, 5)))
    for ours, one in zip(loss(hidden, params), loss(hidden, base.params), strict=True):
        np.testing.assert_allclose(ours, one, rtol=1e-4, atol=1e-5)
