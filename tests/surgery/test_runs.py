"""From runs to a run: views, every surgery's result as an ordinary run, parents, bad inputs, kills."""

import json
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import molora_jax as mj
from launch import flags
from launch import surgery as launcher
from molora_jax.backbones import families, hf_config
from molora_jax.core import factorise
from molora_jax.errors import InputError
from molora_jax.io.base import load_base
from molora_jax.runs import warm_start, written
from molora_jax.runs.manifest import read_manifest
from molora_jax.runs.opened import open_run
from molora_jax.runs.products import products
from molora_jax.runs.verify import verify
from molora_jax.runs.view import Key, View
from molora_jax.surgery.lora_lego import LoraLego
from tests.io import tiny_files
from tests.surgery.make import config_of, lora_rules, new_run
from tests.tiny import tiny_config

QUIET = dict(warn=lambda text: None)


def changes(folder):
    """`{(rule, layer, site): [D_out, D_in]}` of a run of plain adapters."""
    opened = open_run(folder, **QUIET)
    found = products(opened.model, opened.items["adapters"], refuse=InputError)
    return {at: factorise.update(*pair) for at, pair in found.items()}


def perform(tmp_path, name, *inputs, **options):
    return mj.perform(config_of(name, *inputs, **options), tmp_path / "out")


def same(got, want, atol=1e-5):
    assert got.keys() == want.keys()
    for at in want:
        np.testing.assert_allclose(got[at], want[at], atol=atol, err_msg=str(at))


# ---- view and write ------------------------------------------------------------------------------------------------


def test_a_view_names_every_leaf_of_every_layer_and_goes_back():
    shapes = written.shapes_of(tiny_config("mola"), families.TINY, classes=0)["adapters"]  # four segments, routers
    rng = np.random.default_rng(0)
    adapters = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), shapes)
    view = View(adapters)
    assert len(view) == sum(len(leaf) for leaf in flatten_dict(adapters).values())
    assert view["all", 2, "router/q", "W"].shape[0] == 6 and view["all", 0, "q", "A"].shape[0] == 2
    back = flatten_dict(view.tree())
    for path, leaf in flatten_dict(adapters).items():
        np.testing.assert_array_equal(back[path], leaf)
    view["all", 3, "q", "A"] = 2 * view["all", 3, "q", "A"]
    changed = view.tree()
    for path, leaf in flatten_dict(adapters).items():
        factor = 2 if path == ("all", "003-003", "q", "A") else 1
        np.testing.assert_array_equal(flatten_dict(changed)[path], factor * leaf)
    with pytest.raises(InputError, match="no such leaf"):
        view["all", 9, "q", "A"] = 0


def test_shared_leaves_have_no_layer_and_a_segment_has_one_shape():
    tree = {"m": {"shared": {"q": {"P": np.ones((3, 2))}}, "000-001": {"q": {"A": np.zeros((2, 4))}}}}
    view = View(tree)
    assert set(view) == {Key("m", None, "q", "P"), Key("m", 0, "q", "A"), Key("m", 1, "q", "A")}
    view["m", None, "q", "P"] = np.zeros((3, 2))
    assert not view.tree()["m"]["shared"]["q"]["P"].any()
    view["m", 1, "q", "A"] = np.zeros(5)
    with pytest.raises(InputError, match="layers of different shapes"):
        view.tree()
    with pytest.raises(InputError, match=r"a leaf m/000-002/q/A \[2, 4\]"):
        View({"m": {"000-002": {"q": {"A": np.zeros((2, 4))}}}})


def test_a_key_of_no_leaf_says_what_there_is(runs):
    view = mj.load_run(runs["a"]).view()
    for key, words in (
        (("al", 0, "q", "A"), "no such leaf: rule 'al'; expected one of 'all'. Did you mean 'all'"),
        (("all", 9, "q", "A"), "layer 9; expected one of 0 to 3"),
        (("all", 1, "o", "A"), "site 'o'; expected one of 'down', 'q', 'v'"),
        (("all", 1, "q", "C"), "leaf 'C'; expected one of 'A', 'B'"),
        (("all", 1, "q"), "such as"), ("all", "such as"), (("all", slice(0, 2), "q", "A"), "such as"),
    ):  # fmt: skip
        for ask in (view.__getitem__, view.__delitem__, lambda key: view.__setitem__(key, 0)):
            with pytest.raises(InputError, match=words):
                ask(key)
        assert key not in view and view.get(key) is None
    with pytest.raises(InputError, match="got del; .*Write zeros"):
        del view["all", 1, "q", "A"]
    with pytest.raises(InputError, match=r"got a int; expected an array. Write np.full\(\(1, 4, 64\), VALUE"):
        view["all", 1, "q", "A"] = 0


def test_what_is_no_run_or_no_view_is_not_written(runs, tmp_path):
    run = mj.load_run(runs["a"])
    for arguments, more, words in (
        (("new", "runs/a"), {}, r"run: got 'runs/a' .a str.; .*write_run\(DIR, load_run\('runs/a'\)\)"),
        ((run, "new"), {}, r"run: got 'new' .a str.; .*new folder first"), (("new", None), {}, "run: got None"),
        (("new", run), dict(view=run.adapters), "view: got a dict"),
        (("new", run), dict(view=run.view("router_state")), "view: got a view of router_state"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            mj.write_run(*arguments, **more)


def test_a_folder_that_is_no_run_names_those_that_are(runs, tmp_path):
    group = tmp_path / "group"
    for name in ("b", "a"):
        shutil.copytree(runs["a"], group / f"seed={name}")
    (group / "runs.json").write_text(json.dumps({"runs": ["seed=b", "seed=a"]}))
    message = r"the folder of a group of runs \(seed=b, seed=a\); .*Give one of them, such as .*group/seed=b"
    with pytest.raises(InputError, match=message):
        perform(tmp_path, "average", group, runs["b"])
    base = tmp_path / "model"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(InputError, match="whose config.json is a base model's; .*load_base"):
        mj.load_run(base)


def test_a_run_is_written_and_opened_again(runs, tmp_path):
    run = mj.load_run(f"{runs['a']}@0")
    view = run.view()
    view["all", 1, "v", "B"] = 0 * view["all", 1, "v", "B"]
    folder = mj.write_run(tmp_path / "new", run, view=view)
    again = mj.load_run(folder)
    for key in view:
        np.testing.assert_array_equal(again.view()[key], view[key])
    assert again.step == 0 and again.metrics() == [] and again.config.data.tasks == run.config.data.tasks
    manifest = read_manifest(folder / "checkpoints" / "0")
    assert manifest["parents"] == [{"path": str(runs["a"]), "step": 0, "digest": run.digest}]
    assert verify(folder) | {"ok": True, "notes": [], "problems": []} == verify(folder)
    assert again.digest != run.digest
    with pytest.raises(InputError, match="which holds checkpoints"):
        mj.write_run(folder, run)
    bad = again.view()
    bad["all", 1, "v", "B"] = bad["all", 1, "v", "B"] + np.nan
    with pytest.raises(InputError, match="NaN or Inf in adapters/all/000-003/v/B"):
        mj.write_run(tmp_path / "bad", run, view=bad)
    for layer in range(4):
        bad["all", layer, "v", "B"] = np.zeros((1, 2, 32), np.float32)
    with pytest.raises(InputError, match=r"adapters/all/000-003/v/B: got float32\[4, 1, 2, 32\]; expected .*4, 32"):
        mj.write_run(tmp_path / "bad", run, view=bad)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_what_a_run_says(runs):
    run = mj.load_run(runs["a"])
    prompt, answer = "Double 3", "6"
    one, several = run.nll(prompt, answer), run.nll([prompt, "Is 3 even?", prompt], [answer, "no", answer])
    assert several.shape == (3,) and several[0] == pytest.approx(one, abs=1e-5) and several[2] == several[0]
    context = run.prompt_ids(prompt)
    target = [*run.tokenizer.encode(answer), run.tokenizer.eos_id]
    z = run.logits(context + target).astype(np.float64)
    logp = z - np.log(np.exp(z).sum(-1, keepdims=True))
    wanted = -np.mean([logp[len(context) - 1 + i, token] for i, token in enumerate(target)])
    assert one == pytest.approx(wanted, abs=1e-4)
    assert run.logits("Double").shape == (len(run.tokens("Double")), 320)
    for arguments, message in (
        (("", "6"), "prompt"), (("a", ""), "answer"), ((["a"], ["b", "c"]), "2 texts"), (("a" * 600, "b"), "tokens"),
        ((None, "6"), "prompt: got None .a NoneType.; expected a text, or a list"), (("a", None), "answer: got None"),
        ((["a", "b", "c"], "yes"), "answer: got 'yes' .a str.; expected a list"), ((3, 4), "prompt: got 3"),
        (("a", ["b"]), "answer: got .*a list.; expected a text"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            run.nll(*arguments)


# ---- surgeries -----------------------------------------------------------------------------------------------------


def test_the_sum_is_an_ordinary_run(runs, tmp_path, capsys):
    out = tmp_path / "sum"
    inputs = f"{runs['a']},{runs['wide']}@0"
    launcher.run([f"--config={mj.__path__[0]}/../configs/task_arithmetic.py", f"--workdir={out}",
                  f"--config.surgery.inputs={inputs}", "--config.surgery.weights=1,-0.5"])  # fmt: skip
    assert capsys.readouterr().out == f"{out}\n"
    a, wide = changes(runs["a"]), changes(runs["wide"])
    same(changes(out), {at: a[at] - 0.5 * wide[at] for at in a})
    run = mj.load_run(out)
    assert run.model.rules[0].adapter.rank == 12 and run.config.surgery.name == "task_arithmetic"
    assert isinstance(run.generate("Double 4", max_new_tokens=2), str)
    shapes = {item: getattr(run, item) for item in ("adapters", "router_state")}
    start = warm_start.start(str(out), shapes, base={"digest": run.facts["base_digest"]})
    np.testing.assert_array_equal(flatten_dict(start["adapters"], sep="/")["all/000-003/q/A"],
                                  run.adapters["all"]["000-003"]["q"]["A"])  # fmt: skip
    report = mj.evaluate(out)
    assert set(report["tasks"]) == {"double", "even"} and report["step"] == 0
    recorded = json.loads((out / "identity.json").read_text())["extra"]["surgery"]
    assert recorded["weights"] == "1,-0.5" and len(recorded["inputs"]) == 2
    again = perform(tmp_path, "average", out, out)
    same(changes(again), changes(out))


def test_average_of_leaves_and_of_products(runs, tmp_path):
    views = [mj.load_run(runs[name]).view() for name in "abc"]
    out = mj.load_run(perform(tmp_path, "average", *(runs[name] for name in "abc"))).view()
    for key in out:
        np.testing.assert_allclose(out[key], sum(np.asarray(v[key], np.float64) for v in views) / 3, atol=1e-6)
    each = [changes(runs[name]) for name in "abc"]
    got = changes(mj.perform(config_of("average", *(runs[n] for n in "abc"), of="product", rank=12), tmp_path / "p"))
    same(got, {at: sum(c[at] for c in each) / 3 for at in each[0]})


def test_average_of_routed_runs_is_leaf_by_leaf(tmp_path):
    from configs import common

    router = dict(name="sigmoid_topk", k=1, share="site")
    rules = lambda: {"mix": common.rule("q", experts="4", adapter=common.adapter(rank=2), router=router)}  # noqa: E731
    a, b = (new_run(tmp_path / name, rules(), seed=i) for i, name in enumerate("ab"))
    out = mj.load_run(perform(tmp_path, "average", a, b, weights="0.25,0.75"))
    for item in ("adapters", "router_state"):
        x, y, z = (mj.load_run(folder).view(item) for folder in (a, b, out.workdir))
        assert len(z)
        for key in z:
            np.testing.assert_allclose(z[key], 0.25 * x[key] + 0.75 * y[key], atol=1e-6)
    for name in ("lora_lego", "task_arithmetic", "ties"):
        with pytest.raises(InputError, match="whose rule mix is a mixture"):
            mj.perform(config_of(name, a, b), tmp_path / "none")
    with pytest.raises(InputError, match="whose rule mix routes: what it adds depends on the token"):
        mj.perform(config_of("merge_into_base", a), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_lego_merges_every_site_as_the_formula_does(runs, tmp_path):
    out = perform(tmp_path, "lora_lego", runs["a"], runs["wide"], rank=5)
    parts = [open_run(runs[name], **QUIET) for name in ("a", "wide")]
    found = [products(one.model, one.items["adapters"], refuse=InputError) for one in parts]
    same(changes(out), {at: factorise.update(*LoraLego().merged([f[at] for f in found], 5)) for at in found[0]})
    assert mj.load_run(out).config.method.rules["all"].adapter.to_dict() == dict(
        name="lora", rank=5, alpha=5.0, dropout=0.0, init="kaiming"
    )
    with pytest.raises(InputError, match="surgery.rank: got 13; expected at most 12"):
        mj.perform(config_of("lora_lego", runs["a"], runs["wide"], rank=13), tmp_path / "none")


@pytest.mark.parametrize("name", ["lora", "dora", "pissa"])
def test_a_merged_base_is_the_run_without_its_adapters(name, tmp_path):
    adapter = dict(name="dora" if name == "dora" else "lora", init="pissa" if name == "pissa" else "kaiming")
    run = mj.load_run(new_run(tmp_path / "run", lora_rules(sites="q,down", **adapter), seed=3))
    out = perform(tmp_path, "merge_into_base", run.workdir)
    merged = mj.load_run(out)
    assert merged.model.rules == () and merged.facts["base_digest"] != run.facts["base_digest"]
    wanted = run.logits("Is 12 even?")
    np.testing.assert_allclose(merged.logits("Is 12 even?"), wanted, atol=1e-4 * np.abs(wanted).max())
    moved = out.rename(tmp_path / "moved")
    base = load_base(str(moved / "base"))
    assert base.digest == merged.facts["base_digest"] and mj.load_run(moved).config.base.source.endswith("moved/base")
    assert verify(moved)["ok"] and verify(moved)["notes"] == []
    with pytest.raises(InputError, match="a folder inside a run; .*Give the run itself: .*moved."):
        mj.load_run(moved / "base")
    weights = moved / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    assert "the content of model.safetensors has changed" in verify(moved)["problems"][0]
    with pytest.raises(InputError, match="base.source"):
        mj.load_run(moved)


def test_a_merged_base_has_transformers_logits(tmp_path):
    """peft's merge of the same numbers, and transformers' logits of it (`fixtures/make_merging.py`)."""
    oracle = np.load(pathlib.Path(__file__).parents[1] / "fixtures" / "merged_base.npz")
    weights = {name.removeprefix("base/"): oracle[name] for name in oracle.files if name.startswith("base/")}
    folder = tiny_files.write_hf_folder(tmp_path / "base", json.loads(str(oracle["config"])), weights)
    made = new_run(tmp_path / "zero", lora_rules(rank=2, alpha=3.0), source=f"dir:{folder}")
    run = mj.load_run(made)
    view = run.view()
    for key in view:
        x = oracle[f"lora/{key.layer}/{key.site}/{key.leaf}"]
        view[key] = (x if key.leaf == "A" else x.T)[None]
    run = mj.load_run(mj.write_run(tmp_path / "run", run, view=view))
    ids = oracle["ids"].tolist()
    np.testing.assert_allclose(run.logits(ids), oracle["logits"], atol=2e-4)
    merged = mj.load_run(perform(tmp_path, "merge_into_base", run.workdir))
    np.testing.assert_allclose(merged.logits(ids), oracle["logits"], atol=2e-4)
    np.testing.assert_allclose(merged.params["blocks"]["down"]["kernel"][1].T, oracle["kernel"], atol=1e-6)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / "base" / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("name", families.RANDOM)
def test_a_random_base_has_a_config_of_its_own(name):
    backbone = families.RANDOM[name]
    assert hf_config.from_hf(hf_config.to_hf(backbone), where="config.json") == backbone


def test_trained_copies_of_base_leaves_are_merged_too(tmp_path):
    def modules(params):
        return {"base": {"embed": 1.5 * params["embed"].astype(np.float32)}}

    made = new_run(tmp_path / "run", lora_rules(), modules=modules, method=dict(train_base="embed"))
    run = mj.load_run(made)
    merged = mj.load_run(perform(tmp_path, "merge_into_base", made))
    assert merged.modules == {} and merged.config.method.train_base == ""
    np.testing.assert_allclose(merged.params["embed"], run.params["embed"])
    np.testing.assert_allclose(merged.logits("a b"), run.logits("a b"), atol=1e-4)
    with pytest.raises(InputError, match="which trained a head or base leaves"):
        mj.perform(config_of("task_arithmetic", made, made), tmp_path / "none")


# ---- parents, bad input, kills --------------------------------------------------------------------------------------


def test_verify_says_what_became_of_the_parents(runs, tmp_path):
    a = shutil.copytree(runs["a"], tmp_path / "a")
    b = shutil.copytree(runs["b"], tmp_path / "b")
    out = perform(tmp_path, "lora_lego", a, b)
    assert verify(out)["notes"] == []
    shutil.rmtree(a)
    shutil.rmtree(b)
    shutil.copytree(runs["c"], b)
    found = verify(out)
    assert found["ok"] and found["problems"] == []
    gone, changed = found["notes"]
    assert gone == f"parent {a}@0 is gone" and f"parent {b}@0 has changed" in changed
    assert isinstance(mj.load_run(out).generate("x", max_new_tokens=1), str)


def test_bad_inputs_are_named_before_anything_is_computed(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(LoraLego, "apply", lambda *_: pytest.fail("computed"))
    other = new_run(tmp_path / "other", lora_rules(), source="random:tiny-untied")
    sites = new_run(tmp_path / "sites", lora_rules(sites="q,v"))
    dora = new_run(tmp_path / "dora", lora_rules(name="dora"))
    alone = new_run(tmp_path / "alone", {}, method=dict(train_base="norms"))
    nan = tmp_path / "nan"
    monkeypatch.setattr(written, "check_finite", lambda *_, **__: None)
    new_run(nan, lora_rules(), scale=np.nan)
    held = tmp_path / "held"
    held.mkdir()
    (held / "file").touch()
    a = runs["a"]
    cases = [
        ("lora_lego", [a, other], "out", "surgery.inputs: got .*other, trained on base"),
        ("lora_lego", [a, sites], "out", "sites, without down of layer 0"),
        ("lora_lego", [sites, a], "out", "sites, without down of layer 0"),
        ("average", [a, runs["wide"]], "out", r"adapter.rank = 8, where .* has 4"),
        ("ties", [a, runs["wide"]], "out2", "with rank 8 at q of layer 0"),
        ("lora_lego", [a, dora], "out", "whose adapter is Dora"),
        ("lora_lego", [alone], "out", "alone, without adapters"),
        ("lora_lego", [a, nan], "out", "NaN or Inf in adapters/all"),
        ("lora_lego", [a, tmp_path / "gone"], "out", "which does not exist"),
        ("lora_lego", [f"{a}@7"], "out", "step: got 7"),
        ("lora_lego", [f"{a}@x"], "out", "step: got 'x'"),
        ("lora_lego", [], "out", "0 runs; expected 1 or more"),
        ("ties", [a], "out", "1 runs; expected 2 or more"),
        ("merge_into_base", [a, a], "out", "2 runs; expected 1"),
        ("lora_lego", [a], a, "which holds"),
        ("lora_lego", [a], a / "inside", "the folder of an input, or inside it"),
        ("lora_lego", [a], held, "which holds file"),
        ("lora_lego", [a], held / "file", "a file"),
        ("average", [a, runs["b"]], "out3", "surgery.weights: got '1,2,3'"),
    ]
    options = {"out2": dict(of="factors"), "out3": dict(weights="1,2,3")}
    for name, inputs, out, message in cases:
        with pytest.raises(InputError, match=message):
            mj.perform(config_of(name, *inputs, **options.get(out, {})), tmp_path / out)
    for change, message in (
        (dict(rank=-1), "surgery.rank"), (dict(norm="l3"), "surgery.norm"), (dict(k=2), "an unknown field"),
        (dict(inputs=("",)), "surgery.inputs"),
        (dict(inputs="x,y"), r"surgery.inputs: got 'x,y' .a str.; expected a tuple.* Write \('x', 'y',\)"),
        (dict(inputs=(pathlib.Path("x"),)), "each a text"), (dict(name="lora_leg"), "surgery.name"),
    ):  # fmt: skip
        config = config_of("lora_lego", a)
        config.surgery = config.surgery.to_dict() | change
        with pytest.raises(InputError, match=message):
            mj.perform(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_surgery_that_ends_early_leaves_nothing(runs, tmp_path, monkeypatch):
    for where in ("snapshot", "written", "manifest", "read back", "renamed"):
        monkeypatch.setattr(written.Checkpoints, "reached", _stop_at(where))
        with pytest.raises((KeyboardInterrupt, InputError)):
            perform(tmp_path, "lora_lego", runs["a"], runs["b"])
        assert list(tmp_path.iterdir()) == [], where
    monkeypatch.undo()
    assert verify(perform(tmp_path, "lora_lego", runs["a"], runs["b"]))["ok"]


@pytest.mark.slow
def test_kill_9_leaves_no_half_run(runs, tmp_path):
    code = (
        "import os, sys, molora_jax as mj\n"
        "from molora_jax.runs.checkpoints import Checkpoints\n"
        "from tests.surgery.make import config_of\n"
        "Checkpoints.reached = lambda self, point: point == sys.argv[1] and os.kill(os.getpid(), 9)\n"
        "mj.perform(config_of('lora_lego', *sys.argv[3:]), sys.argv[2])"
    )
    out = tmp_path / "out"
    for point in ("snapshot", "written", "manifest", "renamed"):
        command = [sys.executable, "-c", code, point, str(out), str(runs["a"]), str(runs["b"])]
        assert subprocess.run(command, cwd=flags.ROOT, check=False, timeout=300).returncode == -9
        assert not out.exists() and [path.name[:6] for path in tmp_path.iterdir()] == [".part-"]
    perform(tmp_path, "lora_lego", runs["a"], runs["b"])
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and verify(out)["ok"]


def _stop_at(where):
    def reached(self, point):
        if point == where:
            raise KeyboardInterrupt

    return reached


OUTSIDE = """
import dataclasses
from typing import ClassVar
from molora_jax.surgery.base import Result, Surgery

@dataclasses.dataclass(frozen=True)
class Scale(Surgery):
    by: float = 0.5
    LIMITS: ClassVar = {"by": (0.0, 1.0)}

    def apply(self, parents):
        (parent,) = parents
        return Result(parent.config, {k: x * (1 if k.leaf == "A" else self.by) for k, x in parent.view().items()})
"""


def test_a_surgery_from_outside(runs, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mysurgery.py").write_text(OUTSIDE)
    monkeypatch.syspath_prepend(tmp_path / "elsewhere")
    out = perform(tmp_path, "mysurgery:Scale", runs["a"], by=0.25)
    same(changes(out), {at: 0.25 * change for at, change in changes(runs["a"]).items()})
    with pytest.raises(InputError, match="surgery.by: got 2.0"):
        mj.perform(config_of("mysurgery:Scale", runs["a"], by=2.0), tmp_path / "none")
    monkeypatch.undo()
    monkeypatch.delitem(sys.modules, "mysurgery")
    assert mj.load_run(out).config.surgery.name == "mysurgery:Scale", "the run needs nobody's code"


def test_what_the_page_shows_runs(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(runs["a"], tmp_path / "runs" / "a")
    page = (flags.ROOT / "docs" / "surgery.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    exec(compile(code, "docs/surgery.md", "exec"), {})
    assert not np.any(mj.load_run("runs/without").view()["all", 3, "q", "B"])
    assert verify("runs/merged")["ok"]


def test_a_config_of_a_surgery_does_not_train(runs, tmp_path):
    with pytest.raises(InputError, match="python -m launch.surgery"):
        mj.train(config_of("lora_lego", runs["a"]), tmp_path / "none")
