"""gpt-oss: LoRA on its experts against einsums with biases and clamps, its engines, MXFP4, what is refused."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from configs import common
from molora_jax import sharding
from molora_jax.backbones.gpt_oss import GptOss
from molora_jax.backbones.hf_config import from_hf
from molora_jax.engines import Engine
from molora_jax.errors import InputError
from molora_jax.io import huggingface, mxfp4
from molora_jax.io.base import load_base
from tests.backbones import backbone_cases, others
from tests.backbones.test_moe import B, Einsums, checked, close, config_of, loss_of, problem, reference

SMALL = GptOss(
    family="gpt_oss", layers=2, width=16, ffn_width=12, heads=2, kv_heads=1, head_dim=8, vocab=32, context=64,
    rope_base=1e4, norm_eps=1e-5, tied=True, activation="clamped", qkv_bias=True, o_bias=True, window=4, sliding=(0,),
    experts=4, active=2, expert_width=12,
)  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOLORA_CACHE", str(tmp_path / "cache"))


def biased(model):
    """`problem`, with biases and sinks that are not 0; those of gate and up reach beyond the clamps."""
    params, adapters, batch, weight = problem(model)
    rng = np.random.default_rng(5)

    def draw(path, leaf):
        name = path[-1].key
        if "bias" not in name and name != "sinks":
            return leaf
        return (6 if name in ("gate_bias", "up_bias") else 0.5) * rng.standard_normal(leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, params), adapters, batch, weight


class Biased(Einsums):
    def attention(self, h, weights, core):
        product = lambda site, x: x @ weights[site][0] + weights[site][1]  # noqa: E731
        return product("o", core(*(product(site, h) for site in "qkv")))

    def experts(self, x, routing, kernels, act):
        def product(site, x, letters):
            A, B = (jnp.broadcast_to(self.leaves[site][n], (4, *self.leaves[site][n].shape[1:])) for n in "AB")
            W = kernels[site] + self.scale * jnp.einsum("eri,ero->eio", A, B)
            return jnp.einsum(f"{letters},eio->bseo", x, W) + kernels[f"{site}_bias"]

        g, u = (product(site, x, "bsi") for site in ("gate", "up"))
        m = jnp.minimum(g, 7.0)
        assert act == "clamped"
        h = m / (1 + jnp.exp(-1.702 * m)) * (jnp.clip(u, -7.0, 7.0) + 1)
        return jnp.einsum("bse,bseo->bso", routing.gates, product("down", h, "bsei"))


def adapted():
    return checked(config_of("own", base_router="trained"), SMALL)


@functools.cache
def on_one():
    """Loss and gradients on one device."""
    model = adapted()
    params, adapters, batch, weight = biased(model)
    with jax.default_matmul_precision("highest"):
        return loss_of(model, weight)(adapters, params, batch)


def test_gradients_of_adapters_and_router_are_those_of_einsums():
    model = adapted()
    params, adapters, batch, weight = biased(model)
    with jax.default_matmul_precision("highest"):
        close(on_one(), reference(model, weight, Biased)(adapters, params, batch))


@pytest.mark.parametrize("engine", [pytest.param("gather", marks=pytest.mark.slow), "all_to_all"])
def test_eight_devices(engine):
    """Biases of experts lie in shards as their kernels do; that of `down` is counted once where F is split."""
    model = adapted()
    params, adapters, batch, weight = biased(model)
    wanted = on_one()
    mesh = sharding.make_mesh(dict.fromkeys(sharding.AXES, 1) | dict(expert=2, fsdp=2, tensor=2))
    many = dataclasses.replace(model, engine=Engine(engine, mesh))
    placed = sharding.put(params, sharding.param_shardings(model.config, params, mesh))
    assert placed["blocks"]["experts"]["gate_bias"].addressable_shards[0].data.shape == (2, 2, 6)
    at = sharding.adapter_shardings(adapters, many, mesh)
    found = loss_of(many, weight)(sharding.put(adapters, at), placed, sharding.put_batch(batch, mesh, B))
    close(found, wanted, 1e-3)


def packed(folder, rng):
    """The folder's experts as MXFP4 blocks; the values that these stand for by name."""
    tensors, values = safetensors.numpy.load_file(folder / "model.safetensors"), {}
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
        E, d_in, d_out = tensors.pop(name).shape
        blocks = rng.integers(0, 256, (E, d_out, d_in // 32, 16), np.uint8)
        scales = rng.integers(118, 124, (E, d_out, d_in // 32), np.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        values[name] = mxfp4.dequantize(blocks, scales).swapaxes(1, 2)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = dict(quant_method="mxfp4", modules_to_not_convert=["lm_head"])
    (folder / "config.json").write_text(json.dumps(config))
    return values


def test_mxfp4_blocks_are_what_transformers_makes_of_them():
    with np.load(others.FIXTURE, allow_pickle=False) as file:
        blocks, scales, wanted = (file[f"mxfp4: {name}"] for name in ("blocks", "scales", "values"))
    np.testing.assert_array_equal(mxfp4.dequantize(blocks, scales), wanted)
    assert len(np.unique(wanted)) > 100


def test_a_folder_in_mxfp4_is_read_and_written_dense(tmp_path, monkeypatch):
    wide = backbone_cases.GPT_OSS | dict(intermediate_size=32)
    monkeypatch.setitem(backbone_cases.CASES, "wide", wide)
    others.written(tmp_path / "m", "wide")
    values = packed(tmp_path / "m", np.random.default_rng(0))
    base = load_base(f"dir:{tmp_path / 'm'}")
    for i in range(base.config.layers):
        name = f"model.layers.{i}.mlp.experts."
        experts = {site: leaf[i] for site, leaf in base.params["blocks"]["experts"].items()}
        np.testing.assert_array_equal(experts["gate"], values[f"{name}gate_up_proj"][..., 0::2])
        np.testing.assert_array_equal(experts["up"], values[f"{name}gate_up_proj"][..., 1::2])
        np.testing.assert_array_equal(experts["down"], values[f"{name}down_proj"])
    (tmp_path / "again").mkdir()
    huggingface.write_base(tmp_path / "again", base)
    again = load_base(f"dir:{tmp_path / 'again'}")
    jax.tree.map(np.testing.assert_array_equal, again.params, base.params)
    tensors = safetensors.numpy.load_file(tmp_path / "m" / "model.safetensors")
    (one,) = [name for name in tensors if name.endswith("layers.1.mlp.experts.down_proj_scales")]
    safetensors.numpy.save_file({n: t for n, t in tensors.items() if n != one}, tmp_path / "m" / "model.safetensors")
    with pytest.raises(InputError, match="layers.1.mlp.experts.down_proj_blocks: got blocks and scales"):
        load_base(f"dir:{tmp_path / 'm'}")


def test_defaults_of_transformers():
    bare = dict(model_type="gpt_oss", num_hidden_layers=3, hidden_size=64, intermediate_size=64, vocab_size=32)
    found = from_hf(bare | dict(num_attention_heads=64), where="c")
    assert (found.rope_base, found.rope_scaling.factor, found.rope_scaling.truncate) == (150000.0, 32.0, False)
    assert (found.window, found.sliding, found.experts, found.active) == (128, (0, 2), 128, 4)
    assert found.qkv_bias and found.o_bias and found.normalised and found.head_dim == 64
    hub = dict(experts_per_token=4, initial_context_length=4096, swiglu_limit=7.0, hidden_act="silu")
    assert from_hf(bare | hub | dict(num_attention_heads=64), where="c") == found


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(swiglu_limit=5.0), "swiglu_limit"),
        (dict(quantization_config=dict(quant_method="gptq")), "quantization_config: got gptq"),
        (dict(num_experts_per_tok=9), "num_experts_per_tok"),
        (dict(layer_types=["chunked_attention"] * 2), "layer_types"),
    ],
)
def test_what_is_refused_by_name(changes, message):
    with pytest.raises(InputError, match=message):
        from_hf(backbone_cases.GPT_OSS | changes, where="config.json")


def test_a_rule_on_its_ffn_is_refused_with_the_reason():
    config = config_of()
    config.method.rules = dict(all=common.rule("gate", adapter=common.adapter()))
    with pytest.raises(InputError, match="no one dense FFN"):
        checked(config, SMALL)
