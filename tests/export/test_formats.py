"""What each format writes: keys, shapes and configs against those of its reader; what it refuses; equal outputs."""

import dataclasses
import json
import pathlib
import types

import numpy as np
import pytest

from launch import export as launcher
from molora_jax.backbones.llama import Llama
from molora_jax.errors import InputError
from molora_jax.evaluation.run import load_run
from molora_jax.export import molora, molora_torch, peft
from molora_jax.export.base import Source
from molora_jax.export.perform import perform
from molora_jax.io import gguf, tensors
from molora_jax.io.base import load_base
from molora_jax.io.gguf_arch import LLAMA as NAMES
from molora_jax.io.gguf_model import _unpermute
from molora_jax.placements import PLACEMENTS
from molora_jax.routers import ROUTERS
from molora_jax.runs.opened import open_run
from tests.export import runs

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
SAVED = json.loads((FIXTURES / "export_peft.json").read_text())["saved"]
SERVED = json.loads((FIXTURES / "served_lora.json").read_text())
WIDTHS = {"q": (64, 64), "k": (64, 32), "v": (64, 32), "up": (64, 128), "down": (128, 64)}


def tensors_of(folder) -> dict:
    return tensors.read(folder / "adapter_model.safetensors")


def config_of(folder) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize("name", SAVED)
def test_peft_has_the_names_shapes_and_config_that_peft_saves(exported, name):
    case = runs.EXPERT["experts"] if name == "experts" else runs.STATIC[name]
    _, out, _ = exported(name, case, "peft")
    want, config = SAVED[name], config_of(out)
    assert {n: list(x.shape) for n, x in tensors_of(out).items()} == want["tensors"]
    said = {n: v for n, v in want["config"].items() if v and not (n == "r" and "init_r" in want["config"])}
    assert {n: sorted(v) if isinstance(v := config.get(n), list) else v for n in said} == said
    assert not config.get("rank_pattern") and not config.get("alpha_pattern")
    assert not list(out.glob("*.bin"))


def test_peft_stacks_experts_flat(exported):
    """`lora_A` has an expert's rows together, `lora_B` its columns apart: the products are those of the run."""
    run, out, _ = exported("experts", runs.EXPERT["experts"], "peft")
    view, found = load_run(run, warn=str).view(), tensors_of(out)
    key = "base_model.model.model.layers.2.mlp.experts."
    A, B = (found[f"{key}base_layer.lora_{n}.weight"] for n in "AB")
    A, B = A.reshape(8, 8, 64), B.reshape(64, 8, 8)  # E, 2R, D and 2F, 2R, E
    scale = config_of(out)["lora_alpha"] / config_of(out)["r"]
    for e in (0, 5):
        gate, up = (2.0 * np.asarray(view["all", 2, s, "B"][e]).T @ view["all", 2, s, "A"][e] for s in ("gate", "up"))
        np.testing.assert_allclose(scale * B[:, :, e] @ A[e], np.concatenate([gate, up]), atol=1e-6)


@pytest.mark.parametrize("format", ["peft", "vllm", "sglang", "gguf"])
def test_a_base_that_was_trained_is_sent_to_the_format_that_writes_it(tmp_path, format):
    run = runs.made(tmp_path / "run", ({}, "random:tiny"), method=dict(train_base="norms"))
    with pytest.raises(InputError, match="which trained leaves of the base.*--format=merged writes the whole model"):
        perform(run, format, tmp_path / "out")


def test_the_torch_file_takes_the_runs_base_once(exported):
    _, out, _ = exported("lora", runs.STATIC["lora"], "molora")
    fields = json.loads(molora_torch._metadata(out / molora_torch.FILE)["molora_torch"])["model"]
    assert fields == dict(model_type="llama", num_hidden_layers=4, hidden_size=64, vocab_size=320)

    def model(**changes):
        config = types.SimpleNamespace(**fields | changes)
        return types.SimpleNamespace(config=types.SimpleNamespace(get_text_config=lambda: config))

    right = model()
    molora_torch._check_model(right, fields, out)
    with pytest.raises(ValueError, match="has the adapter of .*load a fresh model"):
        molora_torch._check_model(right, fields, out)
    for changes in (dict(model_type="olmo2"), dict(num_hidden_layers=3), dict(hidden_size=48)):
        with pytest.raises(ValueError, match="expected the run's base"):
            molora_torch._check_model(model(**changes), fields, out)


def test_peft_names_whole_modules_where_a_short_name_means_more(exported):
    _, out, _ = exported("layers", runs.STATIC["layers"], "peft")
    assert config_of(out)["target_modules"] == [
        f"model.layers.{i}.{name}" for i in (0, 1) for name in ("mlp.gate_proj", "self_attn.q_proj")
    ]


def test_peft_names_an_encoders_modules(exported):
    """`dense` is the last part of o, up and down there, so these are named as a whole."""
    _, out, _ = exported("bert", (runs.rules("q,o,down"), "random:tiny-bert"), "peft")
    named = config_of(out)["target_modules"]
    assert "query" in named and "encoder.layer.3.output.dense" in named and "dense" not in named and len(named) == 9
    assert "base_model.model.encoder.layer.0.attention.output.dense.lora_A.weight" in tensors_of(out)


def test_peft_stacks_rules_on_one_site(exported):
    run, out, _ = exported("two", runs.STATIC["two"], "peft")
    config, found = config_of(out), tensors_of(out)
    key, view = "model.layers.3.self_attn.q_proj", load_run(run, warn=str).view()
    A, B = (found[f"base_model.model.{key}.lora_{n}.weight"] for n in "AB")
    assert A.shape == (5, 64) and {**config["rank_pattern"]}.get(key, config["r"]) == 5
    scale = config["alpha_pattern"].get(key, config["lora_alpha"]) / 5
    want = sum(s * np.asarray(view[rule, 3, "q", "B"][0]).T @ view[rule, 3, "q", "A"][0]
               for rule, s in (("all", 1.0), ("more", 4.0)))  # fmt: skip
    np.testing.assert_allclose(scale * B @ A, want, atol=1e-6)


def test_x_lora_has_a_slice_for_each_linear_and_a_folder_for_each_expert(exported):
    _, out, notes = exported("x_lora", runs.MIXED["x_lora"], "peft")
    head, config = tensors_of(out), config_of(out)
    shapes = {n.removeprefix("base_model.internal_xlora_classifier.layers."): x.shape for n, x in head.items()}
    assert shapes == {"0.weight": (12, 64), "0.bias": (12,), "3.weight": (36, 12), "3.bias": (36,)}
    assert config["peft_type"] == "XLORA" and config["layerwise_scalings"] and config["softmax_temperature"] == 1.5
    assert [pathlib.Path(p) for p in config["adapters"].values()] == [out / str(e) for e in range(3)]
    assert all(len(tensors_of(out / str(e))) == 24 for e in range(3)) and "adapters" in notes[0]


def _expected(format, case, rank):
    rows, found = SERVED[format], {}
    for L in range(4):
        for site in case.get("dense", ()):
            module = ("self_attn." if site in "qkv" else "mlp.") + f"{site}_proj"
            for name, shape in rows["dense"]:
                d = dict(zip(("in", "out"), WIDTHS[site], strict=True)) | {"R": rank}
                found[name.format(L=L, M=module)] = tuple(d[word] for word in shape)
        sizes = {"R": rank, "D": 64, "F": 32, "experts": 8, "outer": case.get("outer", 8)}
        for name, shape in rows["experts"] if "outer" in case else ():
            for E in range(8):
                found[name.format(L=L, E=E)] = tuple(sizes[word] for word in shape)
    return found


@pytest.mark.parametrize("format", SERVED)
@pytest.mark.parametrize(("name", "case", "rank"), [("lora", dict(dense=("q", "v", "down")), 4),
    ("experts", dict(outer=8), 4), ("shared", dict(outer=1), 4)])  # fmt: skip
def test_served_formats_have_the_names_and_shapes_of_their_readers(exported, format, name, case, rank):
    _, out, notes = exported(name, (runs.STATIC | runs.EXPERT)[name], format)
    if format == "sglang" and name == "lora":
        found = tensors_of(out)
        zeros = [n for n in found if not n.endswith("lora_B.weight") or not found[n].any()]
        assert [n for n in zeros if "k_proj" in n] == [n for n in found if "k_proj" in n] and "k: SGLang" in notes[0]
        assert all(not found[n].any() for n in found if "k_proj" in n)
        case = case | dict(dense=("q", "k", "v", "down"))
    assert {n: x.shape for n, x in tensors_of(out).items()} == _expected(format, case, rank)
    config = config_of(out)
    assert config["r"] == config["lora_alpha"] == rank and not config["rank_pattern"] and not config["alpha_pattern"]


def test_vllm_and_sglang_hold_the_experts_products(exported):
    run, out, _ = exported("shared", runs.EXPERT["shared"], "vllm")
    one, three = tensors_of(out), tensors_of(exported("shared", runs.EXPERT["shared"], "sglang")[1])
    view, at = load_run(run, warn=str).view(), "base_model.model.model.layers.1.block_sparse_moe.experts"
    for site, name in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
        A, B = (np.asarray(view["all", 1, site, n]) for n in "AB")
        want = 2.0 * B[6 % len(B)].T @ A[6 % len(A)]
        got = one[f"{at}.6.{name}.lora_B.weight"] @ one[f"{at}.6.{name}.lora_A.weight"]
        np.testing.assert_allclose(got, want, atol=1e-6)
        A, B = (three[f"{at}.{name}.lora_{n}.weight"] for n in "AB")
        np.testing.assert_allclose(B[6 % len(B)] @ A[6 % len(A)], want, atol=1e-6)


@pytest.mark.parametrize("name", ["dora", "experts+q", "router"])
def test_merged_is_the_run(exported, name):
    case = (runs.STATIC | runs.EXPERT | {"router": runs.TRAINED_ROUTER})[name]
    run, out, _ = exported(name, case, "merged")
    merged, opened = load_base(f"dir:{out}"), load_run(run, warn=str)
    plain = opened.model.without_rules()
    want, got = runs.logits(opened), runs.said(plain, merged.params, {}, {})
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert np.abs(want - runs.said(plain, opened.params, {}, {})).max() > 0.01


@pytest.mark.parametrize("name", ["two", "qwen3"])
def test_gguf_is_read_back(exported, name):
    """Rows of q and k are interleaved for `llama` alone; the scale is alpha / R, as llama.cpp takes it."""
    run, out, _ = exported(name, runs.STATIC[name], "gguf")
    file, view = gguf.read(out / "adapter.gguf"), load_run(run, warn=str).view()
    assert file.metadata["general.type"] == "adapter" and file.metadata["adapter.type"] == "lora"
    assert file.metadata["general.architecture"] == {"two": "llama", "qwen3": "qwen3"}[name]
    key = NAMES["q"].format(i=1) + ".weight"
    A, B = file.tensor(f"{key}.lora_a"), file.tensor(f"{key}.lora_b")
    B = _unpermute(B, 4) if name == "two" else B
    rules = (("all", 1.0), ("more", 4.0)) if name == "two" else (("all", 2.0),)
    want = sum(s * np.asarray(view[r, 1, "q", "B"][0]).T @ view[r, 1, "q", "A"][0] for r, s in rules)
    np.testing.assert_allclose(file.metadata["adapter.lora.alpha"] / len(A) * B @ A, want, atol=1e-6)
    assert {n.split(".")[2] for n in file.entries} == {NAMES[s].split(".")[-1] for s in ("qku" if name == "two" else
                                                       "qkvo") for s in ([s] if s != "u" else ["up"])}  # fmt: skip


def test_mixlora_has_the_names_of_its_package(exported):
    _, out, _ = exported("mixlora", runs.ROUTED["mixlora"], "mixlora")
    found, config = tensors_of(out), config_of(out)
    assert found["mixlora.layers.3.mlp.moe_gate.weight"].shape == (4, 64)
    assert found["mixlora.layers.0.mlp.down_proj.experts.3.lora_A.weight"].shape == (4, 128)
    assert found["mixlora.layers.0.self_attn.q_proj.lora_B.weight"].shape == (64, 4)  # of rank 2, padded
    assert len(found) == 4 * (1 + 3 * 4 * 2 + 2 * 2)
    assert config["peft_type"] == "MIXLORA" and config["num_experts"] == 4 and config["top_k"] == 2
    assert config["routing_strategy"] == "mixlora" and config["lora_dropout"] > 0  # which its reader insists on


def test_mixlora_is_told_the_balance_loss(tmp_path):
    run = runs.made(tmp_path / "run", runs.ROUTED["mixlora"], **runs.BALANCED)
    assert config_of(perform(run, "mixlora", tmp_path / "out"))["router_aux_loss_coef"] == 0.01


REFUSALS = [
    ("mixlora", "ROUTED", "peft", "whose rule all routes"), ("mixlora", "ROUTED", "merged", "whose rule all routes"),
    ("mola", "ROUTED", "vllm", "whose rule all routes"), ("mola", "ROUTED", "mixlora", "whole feed-forward"),
    ("dora", "STATIC", "vllm", "adapters that are a product"), ("ia3", "STATIC", "gguf", "adapters that are a product"),
    ("experts", "EXPERT", "gguf", "base_experts"), ("coe", "ROUTED", "merged", "whose rule all routes"),
    ("switch", "ROUTED", "mixlora", "renormalised"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "table", "format", "said"), REFUSALS)
def test_what_a_format_cannot_hold_is_refused_with_the_reason(exported, tmp_path, name, table, format, said):
    run, _, _ = exported(name, getattr(runs, table)[name], "molora")
    with pytest.raises(InputError, match=said) as caught:
        perform(run, format, tmp_path / "out")
    assert caught.value.where == f"--format={format}" and not list(tmp_path.iterdir())


def test_a_base_whose_tensors_are_laid_out_otherwise_is_refused(exported, tmp_path):
    """Projections that are one tensor in the checkpoint, experts of a family whose stacks nobody has looked at."""

    class Fused(Llama):
        def shapes(self):
            own = super().shapes()
            return own | {
                "blocks/v/kernel": dataclasses.replace(own["blocks/v/kernel"], name=own["blocks/k/kernel"].name)
            }

    def on(name, table, change):
        run, _, _ = exported(name, table[name], "molora")
        opened = open_run(run, warn=str)
        config = change(opened.base.config)
        return Source(
            dataclasses.replace(opened, base=dataclasses.replace(opened.base, config=config)), "peft", tmp_path
        )

    with pytest.raises(InputError, match="of which v and k are one tensor"):
        peft.adapter(on("vera", runs.STATIC, lambda config: Fused(**vars(config))))
    with pytest.raises(InputError, match="with experts of the family another"):
        peft.adapter(on("experts", runs.EXPERT, lambda config: dataclasses.replace(config, family="another")))


def test_molora_says_what_its_torch_file_does_not_run(exported):
    for name, (case, said) in runs.REFUSED.items():
        _, out, notes = exported(name, case, "molora")
        assert said in notes[0], notes
        assert said in json.loads(tensors.read_metadata(out / "torch.safetensors")["molora_torch"])["lacks"]
    assert set(molora_torch.ROUTERS) <= set(ROUTERS)
    assert set(PLACEMENTS) - set(molora_torch.PLACEMENTS) == {"block"}
    used = {rule["router"]["name"] for case, _ in runs.ROUTED.values() for rule in case.values() if "router" in rule}
    assert used == set(molora_torch.ROUTERS)  # those that the comparison with torch runs


def test_molora_holds_every_leaf_and_the_config(exported):
    run, out, notes = exported("mixlora", runs.ROUTED["mixlora"], "molora")
    assert not notes
    opened, leaves = load_run(run, warn=str), tensors.read(out / molora.LEAVES)
    view = opened.view()
    assert len(leaves) == 11 and "adapters/all/000-003/router/ffn/W" in leaves
    np.testing.assert_array_equal(leaves["adapters/all/000-003/gate/A"][2], view["all", 2, "gate", "A"])
    told = json.loads(tensors.read_metadata(out / molora.LEAVES)["molora"])
    assert told["config"]["method"]["rules"]["all"]["router"]["k"] == 2 and len(told["base"]["digest"]) == 64
    assert (out / "molora_torch.py").read_text() == pathlib.Path(molora_torch.__file__).read_text()


def test_the_launcher_writes_once_and_names_a_format_that_is_none(exported, tmp_path, capsys):
    run, _, _ = exported("lora", runs.STATIC["lora"], "peft")
    out = tmp_path / "out"
    launcher.run([f"--workdir={run}", "--format=peft", f"--out={out}"])
    assert capsys.readouterr().out.strip() == str(out) and (out / "adapter_config.json").exists()
    with pytest.raises(InputError, match="--out"):
        launcher.run([f"--workdir={run}", "--format=peft", f"--out={out}"])
    with pytest.raises(InputError, match="Did you mean 'peft'"):
        launcher.run([f"--workdir={run}", "--format=pefd", f"--out={tmp_path / 'new'}"])
    with pytest.raises(InputError, match="inside the run's folder"):
        launcher.run([f"--workdir={run}", "--format=peft", f"--out={run}/new"])
