"""Adapters in: peft's and exported ones become experts of a routed rule, whatever their ranks, scales and modules."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from configs import common
from launch import flags
from molora_jax import config as config_lib
from molora_jax.backbones.compile import compile_model
from molora_jax.errors import InputError
from molora_jax.evaluation.run import load_run
from molora_jax.export.perform import perform
from molora_jax.io import huggingface, tensors
from molora_jax.io.base import load_base
from molora_jax.runs.expert_runs import load_experts
from tests.backbones import every_family
from tests.export import runs
from tests.tiny import write_family

ADAPTERS = pathlib.Path(__file__).parents[1] / "fixtures" / "adapters"
NAMES = ("patterns", "rslora", "layer", "adalora")
ALL = "q,k,v,o,gate,up,down"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """`(config, params, ids)` of the base that peft's adapters were made on."""
    with np.load(ADAPTERS.parent / "baselines.npz") as file:
        arrays = {n.removeprefix("base/"): file[n] for n in file.files if n.startswith("base/")}
        told, ids = json.loads(str(file["config"])), file["ids"].tolist()
    folder = tmp_path_factory.mktemp("base")
    (folder / "config.json").write_text(json.dumps(told))
    tensors.write_named(folder / "model.safetensors", arrays)
    config, stored = huggingface.opened(folder, np.float32)
    params = huggingface.read(stored)
    return config, params, ids


def rule_of(names, sites=ALL, *, rank=4, loaded=None, router=None, **more):
    router = dict(name="softmax_topk", k=0, share="site") if router is None else router
    load = tuple(n if ":" in n or "/" in n else f"peft:{ADAPTERS / n}" for n in names)
    return common.rule(sites, experts=str(len(load)), load=load, router=router, loaded=loaded,
                       adapter=common.adapter(rank=rank, alpha=3.0, dropout=0.0), **more)  # fmt: skip


def model_of(rule, backbone):
    config = common.get_config()
    config.method.rules = dict(mix=rule)
    config_lib.validate(config)
    return compile_model(config, backbone)


def filled(model, params, digest="", drawn=False):
    """What is not loaded is any number; `drawn`: as a run draws it, a program to compile for each model."""
    init = lambda p: model.init_adapters(jax.random.key(0), p)  # noqa: E731
    if drawn:
        fresh = jax.device_get(jax.jit(init)(params))
    else:
        rng = np.random.default_rng(0)
        fresh = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(x.dtype), jax.eval_shape(init, params))
    return load_experts(model, fresh, {"digest": digest})


def logits(model, params, adapters, ids, only=None):
    E = max(model.rules[0].experts) if model.rules else 0
    more = {} if only is None else {"allowed": np.arange(E) == only}
    return runs.said(model, params, adapters, model.init_router_state(), ids, **more)


@pytest.mark.parametrize("loaded", ["frozen", "trained"])
def test_experts_of_peft_say_what_peft_says(llama, loaded):
    """Each by itself under the router: ranks 1 to 4, patterns of rank and alpha, one layer, rsLoRA, AdaLoRA."""
    config, params, ids = llama
    model = model_of(rule_of(NAMES, loaded=loaded), config)
    adapters = filled(model, params, drawn=loaded == "trained")
    with np.load(ADAPTERS / "logits.npz") as want:
        for e, name in enumerate(NAMES):
            got = logits(model, params, adapters, ids, only=e)
            np.testing.assert_allclose(got, want[name], atol=1e-5, err_msg=name)
            assert np.abs(want[name] - want["base"]).max() > 1e-2


@pytest.mark.parametrize("router", ["top_p", "learned_threshold", "x_lora"])
def test_any_router_takes_them(llama, router):
    config, params, ids = llama
    model = model_of(rule_of(("patterns", "layer"), router=dict(name=router, share="site")), config)
    assert np.isfinite(logits(model, params, filled(model, params), ids)).all()


def test_loaded_experts_are_frozen_or_a_start(llama):
    """Trained: rows that the adapter has not are drawn in A and 0 in B, so they can learn."""
    config, params, _ = llama
    frozen = model_of(rule_of(("layer", "rslora")), config)
    trained = model_of(rule_of(("layer", "rslora"), loaded="trained"), config)
    assert any("/q/" in p for p in frozen.frozen_patterns()) and not any("/q/" in p for p in trained.frozen_patterns())
    own, drawn = (filled(m, params, drawn=m is trained)["mix"]["000-001"] for m in (frozen, trained))
    assert not own["up"]["A"][1, 0, 1:].any() and drawn["up"]["A"][1, 0, 1:].all()  # of rank 1 in a rule of rank 4
    assert not own["up"]["A"][0, 0].any() and drawn["up"]["A"][0, 0].all()  # a layer that it does not adapt
    for at in (own, drawn):
        assert at["up"]["B"][1, 0, :1].all() and not at["up"]["B"][1, 0, 1:].any() and not at["up"]["B"][0, 0].any()


def test_round_trips_are_equal_to_1e_6(exported, tmp_path):
    """A run, exported, is the same products as an expert: through peft and through molora, PiSSA of rank 2R too."""
    names, want, base = [], [], load_base("random:tiny")
    for name in ("lora", "pissa", "two"):
        run, peft, _ = exported(name, runs.STATIC[name], "peft")
        _, own, _ = exported(name, runs.STATIC[name], "molora")
        names += [f"peft:{peft}", f"molora:{own}", str(run)]
        want += [runs.logits(run)] * 3
    model = model_of(rule_of(names, "q,k,v,up,down", rank=8), base.config)
    adapters = filled(model, base.params, base.digest)
    for e, name in enumerate(names):
        got = logits(model, base.params, adapters, runs.IDS, only=e)
        np.testing.assert_allclose(got, want[e], atol=1e-6, err_msg=name)


def test_an_adapter_of_a_fused_module_is_split_into_its_sites(tmp_path):
    """Phi-3's qkv_proj and gate_up_proj: as one LoRA of a stranger, and as we write it, block-diagonal."""
    base = write_family(every_family.DECODERS["phi3"], tmp_path / "base")
    run = runs.made(tmp_path / "run", (runs.rules("q,v,gate,up,down"), f"dir:{base}"))
    out = perform(run, "peft", tmp_path / "out")
    model = model_of(rule_of((f"peft:{out}",)), (loaded := load_base(f"dir:{base}")).config)
    adapters = filled(model, loaded.params, loaded.digest)
    got = logits(model, loaded.params, adapters, runs.IDS)
    np.testing.assert_allclose(got, runs.logits(run), atol=1e-6)
    name, (q, k, v) = "base_model.model.model.layers.0.self_attn.qkv_proj", (slice(0, 48), slice(48, 72), slice(72, 96))
    rng = np.random.default_rng(0)
    A, B = (np.float32(rng.standard_normal(shape)) for shape in ((3, 48), (96, 3)))
    found = {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}
    tensors.write_named(out / "adapter_model.safetensors", found)
    told = json.loads((out / "adapter_config.json").read_text())
    told |= dict(r=3, lora_alpha=6, rank_pattern={}, alpha_pattern={})
    (out / "adapter_config.json").write_text(json.dumps(told))
    own = filled(model, loaded.params, loaded.digest)["mix"]["000-001"]
    for site, rows in (("q", q), ("k", k), ("v", v)):
        change = 3.0 / 4 * own[site]["B"][0, 0].T @ own[site]["A"][0, 0]
        np.testing.assert_allclose(change, 2.0 * B[rows] @ A, atol=1e-5)


def test_an_adapter_of_a_model_with_a_vision_tower_is_one_of_its_text(tmp_path):
    base = write_family(every_family.DECODERS["gemma3_text"], tmp_path / "base")
    told = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": told}))
    run = runs.made(tmp_path / "run", (runs.rules("q,up"), f"dir:{base}"))
    out = perform(run, "peft", tmp_path / "out")
    model = model_of(rule_of((f"peft:{out}",)), (loaded := load_base(f"dir:{base}")).config)
    got = logits(model, loaded.params, filled(model, loaded.params, loaded.digest), runs.IDS)
    np.testing.assert_allclose(got, runs.logits(run), atol=1e-6)


def test_an_ffn_of_experts_takes_adapters_of_the_ffn(exported):
    ffn = (runs.rules("gate,up,down"), "random:tiny")
    run, out, _ = exported("ffn_only", ffn, "peft")
    opened, base = load_run(run, warn=str), load_base("random:tiny")
    model = model_of(rule_of((f"peft:{out}",) * 2, "ffn"), base.config)
    got = logits(model, base.params, filled(model, base.params, base.digest), runs.IDS)
    np.testing.assert_allclose(got, runs.logits(opened), atol=2e-6)


def test_a_command_line_gives_them_by_commas():
    config = common.get_config()
    config.method.rules = dict(mix=rule_of(NAMES[:2]))
    text = ",".join(f"peft:{ADAPTERS / name}" for name in NAMES[1:3])
    config = flags.override(config, [("method.rules.mix.load", text)])
    config = flags.override(config, [("method.rules.mix.loaded", "trained")])
    assert tuple(config.method.rules.mix.load) == tuple(text.split(",")) and config.method.rules.mix.loaded == "trained"
    config_lib.validate(config)


def changed(tmp_path, name="rslora", arrays=None, **fields):
    folder = tmp_path / "adapter"
    shutil.copytree(ADAPTERS / name, folder)
    told = json.loads((folder / "adapter_config.json").read_text()) | fields
    (folder / "adapter_config.json").write_text(json.dumps(told))
    if arrays is not None:
        found = {n: np.array(x) for n, x in tensors.read(folder / "adapter_model.safetensors").items()}
        tensors.write_named(folder / "adapter_model.safetensors", arrays(found))
    return folder


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
BAD = {
    "which adapts 'model.embed_tokens'": dict(
        arrays=lambda f: f | {Q.replace("layers.0.self_attn.q_proj", "embed_tokens"): f[Q]}
    ),
    "of the kind": dict(peft_type="IA3"),
    "use_dora=True": dict(use_dora=True),
    "altered base": dict(init_lora_weights="pissa_niter_4"),
    "modules_to_save": dict(modules_to_save=["lm_head"]),
    "target_parameters": dict(target_parameters=["mlp.experts.down_proj"]),
    "pattern": dict(rank_pattern={"(a+)+$": 3}),
    "at most 3 of": dict(alpha_pattern={".*" * 20 + "x": 4}),
    "an object of patterns": dict(rank_pattern=["q_proj"]),
    "patterns 'q_proj' for lora_alpha": dict(alpha_pattern="q_proj"),
    "changes no module": dict(arrays=lambda f: {}),
    "two lora_A of one module": dict(arrays=lambda f: f | {Q.removeprefix("base_model.model."): f[Q]}),
    "two lora_A of one": dict(arrays=lambda f: f | {Q.replace(".weight", ".other.weight"): f[Q]}),
    "with a tensor .*lora_B.bias": dict(arrays=lambda f: f | {Q.replace("lora_A.weight", "lora_B.bias"): f[Q][0]}),
    "where its config says 5": dict(r=5),
    "lora_alpha": dict(lora_alpha="many"),
    "a positive number": dict(alpha_pattern={"q_proj": float("nan")}),
    "NaN or Inf": dict(arrays=lambda f: f | {Q: f[Q] * np.nan}),
    "lora_A and lora_B of linear": dict(arrays=lambda f: f | {"base_model.model.lm_head.weight": f[Q]}),
    "both factors": dict(arrays=lambda f: {n: x for n, x in f.items() if n != Q}),
    r"\[R, 16\]": dict(arrays=lambda f: f | {Q: f[Q][:, :3]}),
}  # fmt: skip


@pytest.mark.parametrize("said", BAD)
def test_what_is_no_plain_product_is_refused_by_name(llama, tmp_path, said):
    config, params, _ = llama
    folder = changed(tmp_path, **BAD[said])
    with pytest.raises(InputError, match=said) as caught:
        filled(model_of(rule_of((f"peft:{folder}",)), config), params)
    assert caught.value.where == "method.rules.mix.load"


def test_a_module_that_adalora_pruned_to_rank_0_is_as_one_that_is_not_there(llama, tmp_path):
    config, params, ids = llama
    model = model_of(rule_of(("adalora",)), config)

    def without(found, part):
        module = min(found).rpartition("lora_")[0]
        return {name: part(name, x) if name.startswith(module) else x for name, x in found.items()}

    cut = changed(tmp_path / "cut", "adalora", lambda f: without(f, lambda n, x: x[:, :0] if "lora_B" in n else x[:0]))
    zero = changed(tmp_path / "zero", "adalora", lambda f: without(f, lambda n, x: 0 * x))
    found = []
    for folder in (cut, zero):
        own = model_of(rule_of((f"peft:{folder}",)), config)
        found.append(logits(own, params, filled(own, params), ids))
    np.testing.assert_array_equal(*found)
    assert np.abs(found[0] - logits(model, params, filled(model, params), ids)).max() > 1e-3


def test_a_pickle_is_refused_by_name_and_never_read(llama, tmp_path):
    config, params, _ = llama
    folder = changed(tmp_path)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(InputError, match="adapter_model.bin, which could run any code"):
        filled(model_of(rule_of((f"peft:{folder}",)), config), params)


def test_a_site_that_the_rule_has_not_is_named(llama):
    config, params, _ = llama
    with pytest.raises(InputError, match="no down of layer 0, which .*rslora adapts"):
        filled(model_of(rule_of(("rslora",), "q,v"), config), params)
    with pytest.raises(InputError, match="at least 4, the rank of"):
        filled(model_of(rule_of(("rslora",), rank=2), config), params)


def test_molora_folders_of_mixtures_and_other_bases_are_refused(exported, tmp_path):
    base = load_base("random:tiny")
    _, mixture, _ = exported("mixlora", runs.ROUTED["mixlora"], "molora")
    with pytest.raises(InputError, match="a mixture"):
        filled(model_of(rule_of((f"molora:{mixture}",)), base.config), base.params, base.digest)
    _, own, _ = exported("lora", runs.STATIC["lora"], "molora")
    with pytest.raises(InputError, match="trained on base"):
        filled(model_of(rule_of((f"molora:{own}",)), base.config), base.params, "another")
    with pytest.raises(InputError, match="without molora.safetensors"):
        filled(model_of(rule_of((f"molora:{ADAPTERS / 'layer'}",)), base.config), base.params, base.digest)


def test_a_path_that_is_not_there_is_refused_before_jax(tmp_path):
    config = common.get_config()
    config.method.rules = dict(mix=rule_of((f"peft:{tmp_path / 'gone'}",)))
    with pytest.raises(InputError, match="method.rules.mix.load"):
        config_lib.validate(config)
