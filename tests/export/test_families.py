"""Every family goes out: fused projections, stacks of experts, state-space blocks; what no reader takes is refused."""

import json

import jax
import numpy as np
import pytest

from molora_jax.backbones.families import FAMILIES
from molora_jax.errors import InputError
from molora_jax.evaluation.run import load_run
from molora_jax.export import gguf as gguf_format
from molora_jax.export import molora, peft
from molora_jax.export.perform import perform
from molora_jax.io import gguf, tensors
from molora_jax.io.base import load_base
from molora_jax.io.gguf_arch import ARCHITECTURES
from tests.backbones import every_family
from tests.export import runs
from tests.export.test_formats import config_of, tensors_of
from tests.export.test_torch import NEEDS, PYTHON, given, has
from tests.io.test_gguf_families import written
from tests.tiny import write_family

TOP2, OF_MODEL = runs._top2(), dict(name="top_p", p=0.5, share="model")
MIX_MOE = runs.rules("q,v", experts="4", router=TOP2) | {
    "more": runs.rules("o", experts="3", router=runs._top2("attn"))["all"]
}
MIX_SSM = runs.rules("in_proj,x_proj", experts="4", router=TOP2) | {
    "more": runs.rules("out_proj", experts="3", router=runs._top2("attn"))["all"]
}
SHARED = runs.rules(
    sites="ffn", rule=dict(placement=dict(name="base_experts", factors="shared_outer"), base_router="trained")
)["all"]
GEMMA = ("gemma", "gemma2", "gemma3_text")
DENSE, MOE, SSM = every_family.DENSE, every_family.MOE, every_family.MAMBA
CASES = {  # format -> {(family, name): rules}
    "peft": {(f, "two"): runs.TWO for f in DENSE}
    | {(f, "experts"): runs.EXPERT["experts+q"][0] for f in MOE}
    | {(f, "inner"): runs.rules("in_proj,x_proj") for f in SSM}
    | {("phi3", name): runs.STATIC[name][0] for name in ("rslora", "dora", "pissa", "adalora", "lora_xs")}
    | {
        ("phi3", "ia3"): runs._ia3("k,v,down,up"),
        ("phi3", "dora, two rules"): runs.rules("q,v,gate", "dora") | {"b": runs.rules("k,o", "dora")["all"]},
        ("mamba", "ia3"): runs._ia3("out_proj"), ("falcon_mamba", "dora"): runs.rules("in_proj,x_proj", "dora"),
        ("gpt_oss", "shared"): runs.EXPERT["shared"][0],
        ("gpt_oss", "x_lora"): runs.rules("q,v", experts="3", router=runs.X_LORA),
    },
    "merged": {(f, "two"): runs.TWO for f in DENSE}
    | {(f, "experts"): runs.EXPERT["experts+q"][0] for f in MOE}
    | {(f, "all"): runs.rules("in_proj,x_proj,dt_proj,out_proj") for f in SSM},
    "molora": {(f, "mix"): runs.ROUTED["mixlora"][0] for f in DENSE}
    | {(f, "mix"): MIX_MOE for f in MOE}
    | {(f, "experts"): MIX_MOE | dict(experts=runs.EXPERT["experts"][0]["all"]) for f in ("mixtral", "gpt_oss")}
    | {(f, "shared, router"): MIX_MOE | dict(experts=SHARED) for f in ("qwen2_moe", "gpt_oss")}
    | {(f, "mix"): MIX_SSM for f in SSM}
    | {
        ("phi3", name): runs.ROUTED[name][0]
        for name in ("dora", "dora_ffn", "ia3", "hydralora", "attn", "top_p_model", "top1", "x_lora", "coe", "comol")
    }
    | {(f, "model"): runs.rules("q,o", experts="4", router=OF_MODEL) for f in (*GEMMA, "olmo2")}
    | {(f, "model"): runs.rules("in_proj,out_proj", experts="4", router=OF_MODEL) for f in SSM}
    | {(f, "x_lora"): runs.rules("in_proj,x_proj", experts="3", router=runs.X_LORA) for f in SSM}
    | {(f, "x_lora"): runs.rules("q,o", experts="3", router=runs.X_LORA) for f in ("gemma2", "gpt_oss")}
    | {("gemma", "coe"): runs.ROUTED["coe"][0], ("olmo2", "top1"): runs.ROUTED["top1"][0]},
    "mixlora": {(f, "mix"): runs.ROUTED["mixlora"][0] for f in ("llama", "gemma", "gemma2", "phi3")},
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """`made(family, rules) -> (a base's folder, a run on it)`."""
    root, bases, count = tmp_path_factory.mktemp("families"), {}, iter(range(1000))

    def make(family, rules):
        if family not in bases:
            bases[family] = write_family(every_family.DECODERS[family], root / family)
        return bases[family], runs.made(root / f"run{next(count)}" / "run", (rules, f"dir:{bases[family]}"))

    return make


@pytest.mark.slow
@pytest.mark.parametrize("kind", CASES)
def test_every_family_says_in_the_foreign_program_what_it_says_here(made, tmp_path, kind):
    """molora also with a cache, but for a router that reads the base's hidden state."""
    if not has(NEEDS[kind]):
        pytest.skip(f"{PYTHON} has no torch and {NEEDS[kind]}: set MOLORA_TORCH_PYTHON to one that has")
    jobs, want = [], {}
    for (family, name), rules in CASES[kind].items():
        base, run = made(family, rules)
        at = f"{family}, {name}"
        perform(run, kind, tmp_path / at)
        want[at], steps = runs.logits(run), 3 if kind == "molora" and name != "x_lora" else 0
        jobs.append(dict(name=at, kind=kind, base=str(base), out=str(tmp_path / at), ids=runs.IDS, steps=steps))
    with given(tmp_path, jobs) as got:
        assert {name.partition("/")[0] for name in got} == set(want)
        for name, logits in got.items():
            np.testing.assert_allclose(logits, want[name.partition("/")[0]], atol=1e-5, err_msg=name)


def test_every_family_is_compared_or_refused():
    """gemma3 is gemma3_text with a vision tower beside; bert is an encoder."""
    families = FAMILIES.keys() - {"gemma3", "bert"}
    assert set(every_family.DECODERS) == set(molora.FAMILIES) == families
    assert {*peft.CONCATENATED, *peft.IN_TURNS} == MOE.keys()
    assert set(gguf_format.NAMES) == {row.family for row in ARCHITECTURES.values()} | {"mistral"}


def test_a_fused_module_is_one_in_peft(made, tmp_path):
    """Rows of A one below another, B 0 in the rows of the other sites: the product is that of the sites."""
    _, run = made("phi3", runs.rules("q,v,up,down"))
    out = perform(run, "peft", tmp_path / "out")
    found, view, config = tensors_of(out), load_run(run, warn=str).view(), config_of(out)
    assert config["target_modules"] == ["down_proj", "gate_up_proj", "qkv_proj"]
    at = "base_model.model.model.layers.1."
    A, B = (found[f"{at}self_attn.qkv_proj.lora_{n}.weight"] for n in "AB")
    assert A.shape == (8, 48) and B.shape == (96, 8) and len(found) == 2 * 3 * 2
    change = {s: 2.0 * np.asarray(view["all", 1, s, "B"][0]).T @ view["all", 1, s, "A"][0] for s in ("q", "v", "up")}
    scale = {**config["alpha_pattern"]}.get("model.layers.1.self_attn.qkv_proj", config["lora_alpha"]) / 8
    np.testing.assert_allclose(scale * B @ A, np.concatenate([change["q"], np.zeros((24, 48)), change["v"]]), atol=1e-6)
    A, B = (found[f"{at}mlp.gate_up_proj.lora_{n}.weight"] for n in "AB")
    assert not B[:80].any() and B.shape == (160, 4)
    np.testing.assert_allclose(2.0 * B[80:] @ A, change["up"], atol=1e-6)


def test_a_fused_module_keeps_the_magnitude_of_rows_without_an_adapter(made, tmp_path):
    base, run = made("phi3", runs.rules("q,v", "dora"))
    out = perform(run, "peft", tmp_path / "out")
    m = tensors_of(out)["base_model.model.model.layers.0.self_attn.qkv_proj.lora_magnitude_vector"]
    W = tensors.read(base / "model.safetensors")["model.layers.0.self_attn.qkv_proj.weight"]
    np.testing.assert_allclose(m[48:72], np.linalg.norm(W[48:72], axis=1), rtol=1e-6)
    np.testing.assert_array_equal(m[72:], load_run(run, warn=str).view()["all", 0, "v", "m"][0])


def test_gate_and_up_are_in_turns_in_the_experts_of_gpt_oss(made, tmp_path):
    _, run = made("gpt_oss", runs.EXPERT["experts"][0])
    out = perform(run, "peft", tmp_path / "out")
    key = "base_model.model.model.layers.1.mlp.experts.base_layer."
    A, B = (tensors_of(out)[f"{key}lora_{n}.weight"] for n in "AB")
    A, B = A.reshape(4, 8, 32), B.reshape(48, 8, 4)  # E, 2R, D and 2F, 2R, E
    view = load_run(run, warn=str).view()
    for i, site in enumerate(("gate", "up")):
        want = 2.0 * np.asarray(view["all", 1, site, "B"][3]).T @ view["all", 1, site, "A"][3]
        np.testing.assert_allclose(B[i::2, :, 3] @ A[3], want, atol=1e-6)


def test_a_model_with_a_vision_tower_has_its_text_elsewhere(tmp_path):
    """`AutoModelForCausalLM` makes the whole model of such a folder; its vision tower has a q_proj too."""
    base = write_family(every_family.DECODERS["gemma3_text"], tmp_path / "base")
    told = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": told}))
    for name, case in (("peft", runs.TWO), ("molora", runs.ROUTED["mixlora"][0])):
        run = runs.made(tmp_path / name / "run", (case, f"dir:{base}"))
        perform(run, name, tmp_path / name / "out")
    config = config_of(tmp_path / "peft" / "out")
    assert "model.language_model.layers.0.self_attn.q_proj" in config["target_modules"]
    name = "base_model.model.model.language_model.layers.1.mlp.up_proj.lora_A.weight"
    assert name in tensors_of(tmp_path / "peft" / "out")
    spec = json.loads(tensors.read_metadata(tmp_path / "molora" / "out" / "torch.safetensors")["molora_torch"])
    assert spec["layers"]["0"]["blocks"]["ffn"] == "model.language_model.layers.0.mlp"
    assert spec["embed_scale"] == 48**0.5


def test_trained_parts_of_a_tensor_are_written_as_the_whole(made, tmp_path):
    """`method.train_base=all` on a base whose q, k and v are one tensor."""
    base, _ = made("phi3", runs.rules("q"))
    trained = lambda params: {"base": jax.tree.map(lambda x: np.array(x) + 1, params)}  # noqa: E731
    run = runs.made(tmp_path / "run", ({}, f"dir:{base}"), modules=trained, method=dict(train_base="all"))
    out = perform(run, "molora", tmp_path / "out")
    found, was = tensors.read(out / "torch.safetensors"), tensors.read(base / "model.safetensors")
    assert {name.removeprefix("base/") for name in found} == set(was)
    for name, x in was.items():
        np.testing.assert_allclose(found[f"base/{name}"], x + 1, atol=1e-6, err_msg=name)


DIFFERING = runs.rules("q", "dora") | {"b": runs.rules("v", "dora", alpha=9.0)["all"]}
REFUSED = [
    ("phi3", runs.STATIC["vera"][0], "peft", "q and k are one tensor"),
    ("phi3", runs.MIXED["x_lora"][0], "peft", "q and k are one tensor"),
    ("phi3", DIFFERING, "peft", "magnitudes do not add"),
    ("mamba", runs.rules("in_proj,out_proj"), "peft", "peft refuses LORA"),
    ("falcon_mamba", runs.rules("in_proj,dt_proj"), "peft", "of dt_proj it takes the weight"),
    ("mamba", runs.rules("in_proj", experts="3", router=runs.X_LORA), "peft", "X-LoRA reads no other names"),
    ("mamba", runs.rules("in_proj"), "vllm", "a base with attention"),
    ("falcon_mamba", runs.rules("in_proj"), "sglang", "a base with attention"),
    ("mamba", runs.rules("in_proj"), "gguf", "of the family mamba"),
    ("gpt_oss", runs.EXPERT["experts"][0], "vllm", "which are one tensor"),
    ("gpt_oss", runs.EXPERT["experts"][0], "sglang", "which are one tensor"),
    ("olmo2", runs.ROUTED["mixlora"][0], "mixlora", "of the family olmo2"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "rules", "format", "said"), REFUSED)
def test_what_no_reader_takes_is_refused_before_anything_is_written(made, tmp_path, family, rules, format, said):
    _, run = made(family, rules)
    with pytest.raises(InputError, match=said) as caught:
        perform(run, format, tmp_path / "out")
    assert caught.value.where == f"--format={format}" and not list(tmp_path.iterdir())


def test_molora_says_that_it_does_not_run_a_weight_that_is_read_past_its_module(made, tmp_path):
    _, run = made("mamba", runs.rules("in_proj,dt_proj", experts="4", router=TOP2))
    notes: list[str] = []
    perform(run, "molora", tmp_path / "out", note=notes.append)
    assert "dt_proj" in notes[0]


@pytest.mark.parametrize("arch", [a for a in ARCHITECTURES if a not in ("llama", "qwen2", "qwen3")])
def test_a_gguf_adapter_added_to_the_bases_file_is_the_run(tmp_path, monkeypatch, arch):
    """As llama.cpp adds it, `alpha / R` B A to the tensor of the name."""
    monkeypatch.setenv("MOLORA_CACHE", str(tmp_path / "cache"))
    for name in ("base", "added"):
        (tmp_path / name).mkdir()
    _, folder = written(tmp_path / "base", arch)
    rules = runs.rules("q,k,o") if arch == "gpt-oss" else runs.TWO
    run = runs.made(tmp_path / "run", (rules, folder))
    file = gguf.read(perform(run, "gguf", tmp_path / "out") / "adapter.gguf")
    assert file.metadata["general.architecture"] == arch
    stems, added = {name.removesuffix(".lora_a") for name in file.entries if name.endswith(".lora_a")}, {}
    for name in stems:
        A, B = file.tensor(f"{name}.lora_a"), file.tensor(f"{name}.lora_b")
        added[name] = file.metadata["adapter.lora.alpha"] / len(A) * B @ A
    source, _ = written(tmp_path / "added", arch, added)
    ids, opened = [5, 77, 130, 4, 200, 31, 9, 250], load_run(run, warn=str)
    merged, plain = load_base(source), opened.model.without_rules()
    got, want = runs.said(plain, merged.params, {}, {}, ids), runs.logits(opened, ids)
    np.testing.assert_allclose(got, want, atol=2e-6 * max(10, np.abs(want).max()))
    assert np.abs(want - runs.said(plain, opened.params, {}, {}, ids)).max() > 1e-3
