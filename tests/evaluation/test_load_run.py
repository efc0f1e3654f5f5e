"""load_run: what a notebook gets, from any folder, without the data; and what it says to a wrong folder."""

import json
import shutil

import jax
import numpy as np
import pytest

import molora_jax
from molora_jax.backbones.gates import by_layer
from molora_jax.errors import InputError
from molora_jax.evaluation.consistency import srp
from molora_jax.evaluation.run import load_base_run
from molora_jax.runs import saved
from molora_jax.runs.checkpoints import Checkpoints
from tests.tiny import tiny_config, tiny_model


@pytest.fixture(scope="module")
def run(tiny_run):
    return molora_jax.load_run(tiny_run)


def test_it_has_what_the_notebook_needs(run):
    assert run.step == 3 and run.config.base.source == "random:tiny"
    assert [rule.name for rule in run.model.rules] == ["attn", "ffn"]
    assert run.adapters["ffn"]["000-003"]["gate"]["A"].shape == (4, 8, 16, 64)
    assert run.router_state == {} and run.params["embed"].shape == (320, 64)
    assert isinstance(run.generate("Hello", max_new_tokens=4), str)


@pytest.mark.parametrize("mesh", [dict(fsdp=4, tensor=2)])
def test_a_mesh_splits_the_base_and_says_what_one_device_says(run, tiny_run, mesh):
    split = molora_jax.load_run(tiny_run, mesh=mesh)
    kernel = next(leaf for leaf in jax.tree.leaves(split.params) if leaf.ndim == 3)
    assert kernel.sharding.shard_shape(kernel.shape)[1:] != kernel.shape[1:]
    text = "Is 12 even? Grüße"
    np.testing.assert_allclose(split.logits(text), run.logits(text), atol=2e-4)
    np.testing.assert_allclose(split.nll("Double 3", "6"), run.nll("Double 3", "6"), rtol=1e-4)
    assert split.generate("Double 3", max_new_tokens=3) == run.generate("Double 3", max_new_tokens=3)


@pytest.mark.parametrize(
    "mesh, said", [(dict(fsdp=9), "at most 8"), (dict(rows=2), "data, fsdp"), (dict(fsdp=0), "mesh.fsdp"),
                   (dict(tensor=3), "mesh.tensor")],
)  # fmt: skip
def test_a_mesh_that_does_not_fit_is_refused(tiny_run, mesh, said):
    with pytest.raises(InputError, match=said):
        molora_jax.load_run(tiny_run, mesh=mesh)


def test_a_base_without_room_says_what_it_needs(tiny_run, monkeypatch):
    sizes = dict(bytes_limit=50_000, bytes_in_use=0)
    monkeypatch.setattr(type(jax.devices()[0]), "memory_stats", lambda self: sizes, raising=False)
    with pytest.raises(InputError, match="--mesh=fsdp"):
        molora_jax.load_run(tiny_run)


def test_a_list_of_prompts_gives_each_its_own_answer(run):
    prompts = ["Double 3", "Is 12 even? "]
    answers = run.generate(prompts, max_new_tokens=6)
    assert answers == [run.generate(prompt, max_new_tokens=6) for prompt in prompts]
    assert run.generate([]) == []


def test_an_answer_that_the_context_cuts_and_a_tokenizer_without_end_are_said(run, caplog, monkeypatch):
    run.generate("hi", max_new_tokens=2)
    assert not caplog.records
    prompt, context = "x" * 480, run.model.config.context
    run.generate(prompt, max_new_tokens=64)
    (line,) = [r.getMessage() for r in caplog.records]
    assert f"context of {context} tokens has room for {context - len(run.prompt_ids(prompt))} new ones" in line
    caplog.clear()
    monkeypatch.setattr(run.tokenizer, "end_ids", ())
    run.generate("hi", max_new_tokens=2)
    assert "no end token" in caplog.text


def test_routing_has_a_row_for_every_layer_and_a_column_for_every_token(run):
    text = "Is 12 even? Grüße"
    gates = run.routing(text)
    assert list(gates) == ["ffn"] and list(gates["ffn"]) == ["ffn"]
    assert gates["ffn"]["ffn"].shape == (4, len(run.tokens(text)), 8)
    np.testing.assert_allclose(gates["ffn"]["ffn"].sum(-1), 1.0, atol=1e-5)
    assert ((gates["ffn"]["ffn"] > 0).sum(-1) == 2).all()


def test_gates_by_layer_over_segments_and_scopes():
    for method, scopes in (("mola", set("qkvo") | {"gate", "up", "down"}), ("model", {"model"})):
        model, params, adapters, state = tiny_model(method)
        ones = np.ones((1, 8), np.int32)
        batch = dict(tokens=ones, segment_ids=ones, positions=np.arange(8, dtype=np.int32)[None])
        collected = jax.jit(lambda *given, model=model: model.hidden(*given, collect=True)[3])
        gates = by_layer(model, collected(params, adapters, state, batch))["all"]
        assert set(gates) == scopes
        rule = model.rules[0]
        for scope, g in gates.items():
            assert g.shape == (1 if scope == "model" else 4, 1, 8, max(rule.experts))
            for layer, count in enumerate(rule.experts if scope != "model" else ()):
                assert not np.any(g[layer, ..., count:]) and np.any(g[layer, ..., :count])


def test_consistency_is_that_of_the_gates(run):
    texts = ["Is 12 even? Grüße an alle", "Double 3 and then halve it again"]
    found = run.consistency(texts, segment=4)["ffn"]["ffn"]
    assert len(found) == 4
    layer = [run.routing(text)["ffn"]["ffn"][2] for text in texts]
    wanted = srp([np.argsort(-gates, kind="stable")[:, :2] for gates in layer], 8, 4)
    assert found[2] == wanted and 0 < found[2].permuted < 1
    with pytest.raises(InputError, match="texts"):
        run.consistency("one text")
    with pytest.raises(InputError, match="at least 400 tokens"):
        run.consistency(texts, segment=400)


def test_a_rule_on_some_layers_has_zeros_on_the_others():
    config = tiny_config("mixlora")
    config.method.rules.ffn.layers = "1-2"
    from molora_jax.backbones.compile import compile_model
    from molora_jax.io.base import load_base

    base = load_base("random:tiny")
    model = compile_model(config, base.config)
    adapters = jax.jit(lambda p: model.init_adapters(jax.random.key(0), p))(base.params)
    ones = np.ones((1, 8), np.int32)
    batch = dict(tokens=ones, segment_ids=ones, positions=np.arange(8, dtype=np.int32)[None])
    gates = jax.jit(lambda params, adapters: model.hidden(params, adapters, {}, batch, collect=True)[3])
    g = by_layer(model, gates(base.params, adapters))["ffn"]["ffn"]
    assert g.shape == (4, 1, 8, 8) and [bool(np.any(x)) for x in g] == [False, True, True, False]


def test_works_from_anywhere_without_the_data(tiny_run, tmp_path, monkeypatch):
    copy = shutil.copytree(tiny_run, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    config["data"]["tasks"] = "jsonl:gone.jsonl"
    config["train"]["init_from"] = "gone too"
    (copy / "config.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    run = molora_jax.load_run("copy", step="latest")
    assert run.generate("Hello", max_new_tokens=2) is not None
    with pytest.raises(InputError, match="gone.jsonl"):
        run.data  # noqa: B018


def test_steps_by_name_and_number(tiny_run, tmp_path):
    assert molora_jax.load_run(tiny_run, step=2).step == 2
    copy = shutil.copytree(tiny_run, tmp_path / "copy")
    (copy / "checkpoints" / "best.json").write_text('{"step": 2}')
    assert Checkpoints(copy / "checkpoints", keep=1).best() == 2
    assert molora_jax.load_run(copy).step == 2 and molora_jax.load_run(copy, "latest").step == 3
    with pytest.raises(InputError, match=r"step: got 999; expected .*\(.*2, 3\)"):
        molora_jax.load_run(tiny_run, step=999)
    with pytest.raises(InputError, match="step: got 'newest'"):
        molora_jax.load_run(tiny_run, step="newest")


def test_wrong_folders(tiny_run, tmp_path):
    cases = {"workdir: got .*does not exist": tmp_path / "none", "without config.json": tmp_path}
    half = shutil.copytree(tiny_run, tmp_path / "half", ignore=shutil.ignore_patterns("checkpoints"))
    cases["without a checkpoint"] = half
    broken = shutil.copytree(half, tmp_path / "broken")
    (broken / "config.json").write_text("{")
    cases["config.json: got no JSON"] = broken
    foreign = shutil.copytree(half, tmp_path / "foreign")
    (foreign / "config.json").write_text('{"model": "x"}')
    cases["model"] = foreign
    other = shutil.copytree(tiny_run, tmp_path / "other")
    identity = json.loads((other / "identity.json").read_text())
    identity["base"]["digest"] = "0" * 64
    (other / "identity.json").write_text(json.dumps(identity))
    cases["base.source: got random:tiny"] = other
    for message, folder in cases.items():
        with pytest.raises(InputError, match=message):
            molora_jax.load_run(folder)


def test_a_config_that_the_checkpoint_does_not_fit(tiny_run):
    config = saved.read_config(tiny_run)
    config.method.rules.ffn.adapter.rank = 4
    with pytest.raises(InputError, match="adapters"):
        molora_jax.load_run(tiny_run, config=config)


def test_the_base_alone():
    run = load_base_run(tiny_config("mixlora"))
    assert run.model.rules == () and run.step is None and run.routing("text") == {}
    assert isinstance(run.generate("Hello", max_new_tokens=3), str)
