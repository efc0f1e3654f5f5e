"""What a run believes of its folder and of its base: the step's manifest, and nothing that contradicts it silently."""

import datetime
import json
import os
import pathlib
import shutil
import types

import jax
import numpy as np
import pytest

import molora_jax
from launch import evaluate as launch_evaluate
from launch import verify as launch_verify
from molora_jax.errors import InputError
from molora_jax.runs import identity as identity_lib
from molora_jax.runs import saved
from molora_jax.runs.manifest import json_hash, read_manifest
from molora_jax.runs.verify import verify
from molora_jax.training.loop import train
from tests.golden.make_v1 import base, rows
from tests.tiny import tiny_config

OTHER = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}[answer] {% endif %}"
)


def config(steps=4, **changes):
    config = tiny_config("lora")
    config.base.source = "dir:base"
    with config.unlocked():
        config.data.update(tasks="jsonl:rows.jsonl", seq_len=96)
        config.train.update(steps=steps, batch_size=8, save_every=2, keep=3, log_every=100, **changes)
        config.eval.update(num_items=2, num_generated=0, max_new_tokens=2, batch_size=2)
        config.method.rules.all.update(sites="q,v")
        config.method.rules.all.adapter.rank = 2
    return config


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """`base`, `rows.jsonl` and the run `run` of two of four steps."""
    folder, before = tmp_path_factory.mktemp("source"), os.getcwd()
    os.chdir(folder)
    try:
        base(folder / "base")
        rows(folder / "rows.jsonl")
        train(config(stop_after=2), "run", note=lambda text: None)
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def here(source, tmp_path, monkeypatch):
    shutil.copytree(source, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def change(path, **fields):
    """`change(file, a__b=1)` sets a nested field; None deletes it."""
    value = json.loads(pathlib.Path(path).read_text())
    for name, new in fields.items():
        *parents, last = name.split("__")
        node = value
        for parent in parents:
            node = node[parent]
        if new is None:
            del node[last]
        else:
            node[last] = new
    pathlib.Path(path).write_text(json.dumps(value))


def refused(match, run="run"):
    """By a second start and by whoever opens the run."""
    with pytest.raises(InputError, match=match):
        train(config(), run, note=lambda text: None)
    with pytest.raises(InputError, match=match):
        molora_jax.load_run(run)


# ---- the base ----------------------------------------------------------------------------------------------------


def test_another_template_is_refused(here):
    change("base/tokenizer_config.json", chat_template=OTHER)
    refused("base.*tokenizer")


def test_another_end_token_is_refused(here):
    change("base/tokenizer_config.json", eos_token="<|pad|>")
    refused("base.*tokenizer")


@pytest.mark.parametrize("field, value, name", [("rope_theta", 5e3, "rope_base"), ("rms_norm_eps", 1e-3, "norm_eps")])
def test_every_number_of_the_base_is_the_runs(here, field, value, name):
    change("base/config.json", **{field: value})
    refused(rf"base\.config\.{name}: was .*, now {value:g}")


def run_text(run, ids) -> str:
    return molora_jax.load_run(run).tokenizer.decode(ids)


def asked(run) -> str:
    """The prompt as the run's model gets it."""
    return run_text(run, molora_jax.load_run(run).prompt_ids("hi"))


def test_a_template_of_the_day_keeps_the_day_of_the_first_start(here, monkeypatch):
    before = datetime.date.today().isoformat()
    template = json.loads(pathlib.Path("base/tokenizer_config.json").read_text())["chat_template"]
    change("base/tokenizer_config.json", chat_template="{{ strftime_now('%Y-%m-%d') }} " + template)
    monkeypatch.setenv("MOLORA_CACHE", str(here / "cache"))
    train(config(stop_after=2), "dated", note=lambda text: None)
    path = here / "dated" / "identity.json"
    first = json.loads(path.read_text())["base"]["day"]
    assert before <= first <= datetime.date.today().isoformat() and first in asked("dated")
    # as if it had begun long ago
    value = json.loads(path.read_text())
    value["base"]["day"] = "2020-02-29"
    path.write_text(json.dumps(value))
    for step in (0, 2):
        folder = here / "dated" / "checkpoints" / str(step)
        manifest = json.loads((folder / "manifest.json").read_text()) | {"run": value, "identity": json_hash(value)}
        manifest.pop("checksum")
        (folder / "manifest.json").write_text(json.dumps(manifest | {"checksum": json_hash(manifest)}))
    train(config(), "dated", note=lambda text: None)
    assert "2020-02-29" in asked("dated")
    data = molora_jax.load_run("dated").data
    context = data.splits["train"].example(0).context_ids
    assert "2020-02-29" in run_text("dated", context)


# ---- config.json, identity.json, best.json -------------------------------------------------------------------------


ALTERED = [
    dict(method__rules__all__adapter__alpha=64.0), dict(method__rules__all__adapter__name="rslora"),
    dict(base__dtype="bfloat16"), dict(seed=7), dict(data__system="Lie."), dict(method__rules__all__layers="0"),
]  # fmt: skip


@pytest.mark.parametrize("altered", ALTERED, ids=lambda altered: next(iter(altered)))
def test_an_altered_config_changes_no_number(here, altered):
    change("run/config.json", **altered)
    said = []
    config = saved.read_config("run", warn=said.append)
    name = next(iter(altered)).replace("__", ".")
    assert len(said) == 1 and f"{name}: was " in said[0]
    original = read_manifest("run/checkpoints/2")["config"]
    node = config
    for part in name.split("."):
        node, original = node[part], original[part]
    assert node == original
    found = verify("run")
    assert not found["ok"] and name in found["problems"][0]


def test_what_may_change_is_believed(here):
    change("run/config.json", eval__num_items=7, train__log_every=3, mesh__data=4, base__source="dir:elsewhere")
    assert verify("run")["ok"], "without the base"
    os.rename("base", "elsewhere")
    said = []
    config = saved.read_config("run", warn=said.append)
    assert (config.eval.num_items, config.base.source, said) == (7, "dir:elsewhere", [])


def test_an_altered_alpha_does_not_reach_the_report(here, capsys):
    change("run/config.json", method__rules__all__adapter__alpha=999.0)
    launch_evaluate.run(["--workdir=run"])
    shown = capsys.readouterr()
    assert "adapter.alpha: was 32.0, now 999.0" in shown.err
    change("run/config.json", method__rules__all__adapter__alpha=32.0)
    launch_evaluate.run(["--workdir=run"])
    again = capsys.readouterr()
    assert again.out == shown.out and "alpha" not in again.err
    launch_evaluate.run(["--workdir=run", "--config.method.rules.all.adapter.alpha=999"])  # asked for, and said
    asked = capsys.readouterr()
    assert "not as run was trained: method.rules.all.adapter.alpha: was 32.0, now 999.0" in asked.err


@pytest.mark.parametrize("where", ["write_atomically", "plots"])
def test_a_report_on_a_full_disk_is_one_message_below_the_table(here, capsys, monkeypatch, where):
    from molora_jax.evaluation import plots, report

    def full(*_, **__):
        raise OSError(28, "No space left on device", "report")

    pathlib.Path("run/report").mkdir(exist_ok=True)
    pathlib.Path("run/report/report.json").write_text("before")
    monkeypatch.setattr(*((report, where) if where != "plots" else (plots, "save")), full)
    with pytest.raises(InputError, match="report: got No space left on device; expected a file that can be written"):
        launch_evaluate.run(["--workdir=run"])
    assert "NLL tuned" in capsys.readouterr().out
    assert (pathlib.Path("run/report/report.json").read_text() == "before") == (where == "write_atomically")


def test_an_altered_identity_is_refused_and_a_lost_one_made_again(here):
    change("run/identity.json", optim__learning_rate=0.5)
    refused(r"identity\.json: got not the identity .*\n.*optim.learning_rate: was 0.0002, now 0.5")
    assert "identity.json" in verify("run")["problems"][0]
    os.remove("run/identity.json")
    assert molora_jax.load_run("run").step == 2
    other = config()
    other.optim.learning_rate = 0.5
    with pytest.raises(InputError, match="optim.learning_rate: was 0.0002, now 0.5"):
        train(other, "run", note=lambda text: None)
    notes = []
    assert train(config(), "run", note=notes.append).step == 4
    assert any("identity.json was missing: step 2 says" in note for note in notes)
    assert json.loads(pathlib.Path("run/identity.json").read_text()) == read_manifest("run/checkpoints/4")["run"]


def test_best_of_a_step_that_is_not_there_is_said(here):
    pathlib.Path("run/checkpoints/best.json").write_text('{"step": 1}')
    said = []
    assert molora_jax.load_run("run", warn=said.append).step == 2
    assert len(said) == 1 and "names step 1, which is not there" in said[0]
    assert not verify("run")["ok"]


def test_a_config_of_an_older_version_gets_its_defaults_and_of_a_newer_one_is_named(here):
    change("run/config.json", eval=None, expert_parallel=None, train__attention=None, data__bad_rows=None,
           method__rules__all__down=None)  # fmt: skip
    said = []
    config = saved.read_config("run", warn=said.append)
    assert said == [] and config.eval.num_items == 32 and config.train.attention == "xla" and verify("run")["ok"]
    change("run/config.json", data__telepathy=True)
    with pytest.raises(InputError, match="data.telepathy: got an unknown field"):
        saved.read_config("run")


def test_a_state_of_another_step_is_refused(here):
    """Two steps exchanged, manifests mended: their own number tells."""
    os.rename("run/checkpoints/0", "run/checkpoints/zero")
    path = pathlib.Path("run/checkpoints/zero/manifest.json")
    manifest = json.loads(path.read_text()) | {"step": 9}
    manifest.pop("checksum")
    path.write_text(json.dumps(manifest | {"checksum": json_hash(manifest)}))
    os.rename("run/checkpoints/zero", "run/checkpoints/9")
    with pytest.raises(InputError, match="the state of step 0; expected that of step 9"):
        train(config(), "run", note=lambda text: None)


# ---- identities of older versions ----------------------------------------------------------------------------------


def test_what_is_merely_new_is_no_difference_and_is_recorded():
    old = {"data": {"seq_len": 96, "digest": "d"}, "optim": {"name": "adamw"}, "seed": 0}
    new = {
        "data": {"seq_len": 96, "digest": "d", "bad_rows": "error"}, "optim": {"name": "adamw", "b1": 0.9}, "seed": 0,
        "base": {"tokenizer": "t", "config": {"rope_base": 1e4}},
    }  # fmt: skip
    lines, added = identity_lib.compare(old, new)
    assert lines == [] and added == ["base.config.rope_base", "base.tokenizer", "data.bad_rows", "optim.b1"]
    new["data"]["bad_rows"] = "skip"
    assert identity_lib.compare(old, new)[0] == ['data.bad_rows: was absent, now "skip"']
    new["data"]["bad_rows"] = "error"
    whole = identity_lib.extended(old, new, added)
    assert identity_lib.hashes(whole)[-1] == json_hash(old) and identity_lib.compare(whole, new) == ([], [])


def test_a_number_of_the_base_that_becomes_a_group_is_a_difference():
    plain = {"base": {"config": {"rope_scaling": None, "width": 8}}}
    scaled = {"base": {"config": {"rope_scaling": {"factor": 2.0}, "width": 8}}}
    assert any("rope_scaling: was null" in line for line in identity_lib.compare(plain, scaled)[0])
    assert any("rope_scaling: was absent, now null" in line for line in identity_lib.compare(scaled, plain)[0])
    more = {"base": {"config": {"rope_scaling": {"factor": 2.0, "beta": 1.0}, "width": 8, "window": None}}}
    assert identity_lib.compare(scaled, more)[0] == []


# ---- other runs as a start -----------------------------------------------------------------------------------------


def test_a_start_from_a_run_on_another_base_is_refused(here):
    weights = pathlib.Path("base/model.safetensors")
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    with pytest.raises(InputError, match="train.init_from: got run, trained on base"):
        train(config(init_from="run"), "other", note=lambda text: None)


def test_loaded_experts_have_the_alpha_that_they_were_trained_with(here):
    from molora_jax.backbones.compile import compile_model
    from molora_jax.io.base import load_base
    from molora_jax.runs import expert_runs

    decoder = load_base("dir:base")
    rule = types.SimpleNamespace(name="all", router=None)
    before = expert_runs._factors("run", rule, decoder.config, {"digest": decoder.digest}, print)
    change("run/config.json", method__rules__all__adapter__alpha=999.0, base__source="dir:gone")
    after = expert_runs._factors("run", rule, decoder.config, {"digest": decoder.digest}, print)
    jax.tree.map(np.testing.assert_array_equal, before, after)
    with pytest.raises(InputError, match="trained on base"):
        expert_runs._factors("run", rule, decoder.config, {"digest": "0" * 64}, print)
    assert compile_model(saved.read_config("run", need_base=False), decoder.config).rules[0].adapter.alpha == 32.0


# ---- launch.verify -------------------------------------------------------------------------------------------------


def test_verify_names_damage_to_every_file_of_a_step(here, capsys):
    assert launch_verify.run(["--workdir=run"]) == 0 and "step 2: valid" in capsys.readouterr().out
    step = pathlib.Path("run/checkpoints/2")
    for path in sorted(p for p in step.rglob("*") if p.is_file()):
        raw = path.read_bytes()
        for damaged in (raw[:-1] + bytes([raw[-1] ^ 1]), raw[:-1], None) if raw else (b"x",):
            path.write_bytes(damaged) if damaged is not None else path.unlink()
            assert launch_verify.run(["--workdir=run", "--json"]) == 1, path
            found = json.loads(capsys.readouterr().out)
            told = {s["step"]: s for s in found["steps"]}
            assert told[0]["valid"] and not told[2]["valid"] and found["newest_valid"] == 0
            assert path.relative_to(step).as_posix() in told[2]["reason"]
            path.write_bytes(raw)
    assert launch_verify.run(["--workdir=run", "--deep"]) == 0


@pytest.mark.parametrize("name", ["config.json", "identity.json", "metrics.jsonl"])
def test_verify_names_damage_to_the_other_files(here, name):
    path = pathlib.Path("run", name)
    raw = path.read_bytes()
    at = raw.index(b"\n") - 3
    for damaged in (b"", b"{", raw[:at] + raw[at + 4 :]):
        path.write_bytes(damaged)
        found = verify("run")
        assert not found["ok"] and any(name in problem for problem in found["problems"]), (damaged[:50], found)
    path.unlink()
    found = verify("run")
    assert any(name in text for text in found["problems"] + found["notes"])


def test_verify_needs_a_folder_and_says_where_there_is_no_step(tmp_path, capsys):
    for folder in (tmp_path / "none", tmp_path):
        with pytest.raises(InputError, match="workdir"):
            launch_verify.run([f"--workdir={folder}"])
    (tmp_path / "checkpoints").mkdir()
    assert launch_verify.run([f"--workdir={tmp_path}"]) == 0 and "no step" in capsys.readouterr().out
