"""Members of a package outside the tree, by import path: one of every axis trains, resumes and is opened again."""

import json
import pathlib
import shutil
import sys

import pytest

from configs import common
from launch import flags, generate, verify
from molora_jax import config as schema
from molora_jax.backbones import families
from molora_jax.backbones.compile import compile_model
from molora_jax.config import members, outside
from molora_jax.errors import InputError
from molora_jax.runs import saved
from molora_jax.runs.manifest import read_manifest
from molora_jax.training.loop import train
from tests.tiny import write_task

SOURCE = pathlib.Path(__file__).parent / "mypackage"
ENGINE = pathlib.Path(__file__).parents[1] / "engines" / "toy_engine.py"
R, M = "mypackage.routers:NearBest", "mypackage.more"


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The package in a folder of its own, outside the tree."""
    folder = tmp_path_factory.mktemp("elsewhere")
    shutil.copytree(SOURCE, folder / "mypackage")
    shutil.copy(ENGINE, folder / "mypackage" / "toy_engine.py")
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    forget("mypackage")


def forget(package):
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        del sys.modules[name]
    members.options.cache_clear()


def config_of(task):
    config = common.get_config()
    adapter = dict(name=f"{M}:Louder", rank=2, alpha=4.0, dropout=0.05, init=f"{M}:narrow", gain=1.5)
    config.method.rules = dict(
        attn=common.rule("q,v", adapter=adapter, placement=dict(name=f"{M}:Values")),
        ffn=common.rule("ffn", experts="4", adapter=adapter, router=dict(name=R, tau=0.8, share="ffn")),
    )
    config.losses = dict(peak=dict(name=f"{M}:Peak", weight=0.1), z_loss=dict(weight=1e-3))
    config.optim = dict(name=f"{M}:Lion", learning_rate=1e-3, warmup=1)
    config.objective = dict(name=f"{M}:Scaled", by=0.5)
    config.base.source, config.engine = "random:tiny", "mypackage:toy_engine"
    config.mesh.update(data=2, expert=4)
    config.data.update(tasks=f"jsonl:{task}", seq_len=64)
    config.train.update(steps=3, batch_size=8, save_every=1, keep=3, log_every=1)
    return config


@pytest.fixture(scope="module")
def run(package, tmp_path_factory):
    """Three steps; and the same folder as it was after two, started again."""
    folder = tmp_path_factory.mktemp("run")
    config, notes = config_of(write_task(folder / "task.jsonl", rows=40)), []
    schema.validate(config)
    train(config, str(folder / "whole"), note=notes.append)
    shutil.copytree(folder / "whole", folder / "run")
    shutil.rmtree(folder / "run" / "checkpoints" / "3")
    assert train(config, str(folder / "run"), note=notes.append).step == 3
    return folder / "run", folder / "whole", "\n".join(notes)


def test_a_run_of_members_from_outside_trains_and_resumes_bit_for_bit(run):
    resumed, whole, notes = run
    trees = [read_manifest(folder / "checkpoints" / "3")["tree"] for folder in (resumed, whole)]
    assert trees[0] == trees[1] and trees[0]["adapters"]
    rows = [json.loads(line) for line in (resumed / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3] and "aux/peak" in rows[0] and "aux/z_loss" in rows[0]
    assert rows[0]["loss"] == pytest.approx(
        0.5 * rows[0]["lm_loss"] + 0.1 * rows[0]["aux/peak"] + 1e-3 * rows[0]["aux/z_loss"], rel=1e-4
    )
    assert "mypackage:toy_engine" in notes  # the table of bytes names the engine


def test_the_run_keeps_the_names_and_is_opened_again(run, capsys):
    folder = run[0]
    for told in (
        json.loads((folder / "identity.json").read_text()),
        read_manifest(folder / "checkpoints" / "3")["run"],
    ):
        assert told["method"]["rules"]["ffn"]["router"] == {"name": R, "tau": 0.8, "share": "ffn"}
        assert told["losses"]["peak"]["name"] == f"{M}:Peak" and told["optim"]["name"] == f"{M}:Lion"
    assert not generate.run([f"--workdir={folder}", "--prompt=Double 3", "--max_new_tokens=4"])
    assert verify.run([f"--workdir={folder}"]) == 0 and "valid" in capsys.readouterr().out


@pytest.mark.slow
def test_the_run_is_evaluated(run, capsys):
    from launch import evaluate

    assert not evaluate.run([f"--workdir={run[0]}", "--config.eval.num_items=4", "--config.eval.num_generated=2"])
    assert (run[0] / "report" / "report.json").is_file()


def test_a_run_whose_package_is_gone_says_what_to_install(run, package, capsys):
    sys.path.remove(str(package))
    forget("mypackage")
    try:
        with pytest.raises(InputError, match="Install the package that has the module mypackage"):
            generate.run([f"--workdir={run[0]}", "--prompt=x"])
        assert verify.run([f"--workdir={run[0]}"]) == 1
        assert "Install the package that has the module mypackage" in capsys.readouterr().out
    finally:
        sys.path.insert(0, str(package))


def test_a_runs_folder_brings_no_code(run, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)
    (folder / "stranger.py").write_text("raise SystemExit('code of a stranger ran')\n")
    text = (folder / "config.json").read_text().replace(f"{M}:Lion", "stranger:Lion")
    (folder / "config.json").write_text(text)
    shutil.rmtree(folder / "checkpoints")
    monkeypatch.syspath_prepend(str(folder))
    with pytest.raises(InputError, match="stranger.*inside a run's folder"):
        saved.read_config(folder)
    assert "stranger" not in sys.modules
    (folder / "config.json").write_text(text.replace("stranger:Lion", "antigravity:geohash"))
    with pytest.raises(InputError, match="a module of Python itself"):
        saved.read_config(folder)
    assert "antigravity" not in sys.modules


def mixlora(**changes):
    config = flags.load(flags.ROOT / "configs" / "mixlora.py")
    config.base.source = "random:tiny"
    del config.method.rules.ffn.router.k  # softmax_topk's own
    if any("placement" in path for path in changes):
        config.method.rules.attn.placement = {}
    return flags.override(config, [(path, str(value)) for path, value in changes.items()])


ROUTER = "method.rules.ffn.router"
ADAPTER = "method.rules.ffn.adapter"
WRONG = {  # changes of mixlora -> the field that is named, and words of the message
    "a range": ({f"{ROUTER}.name": R, f"{ROUTER}.tau": 1.5}, f"{ROUTER}.tau", "in (0, 1]"),
    "an open bound": ({f"{ROUTER}.name": R, f"{ROUTER}.tau": 0.0}, f"{ROUTER}.tau", "in (0, 1]"),
    "a value": ({f"{ROUTER}.name": R, f"{ROUTER}.gates": "equals"}, f"{ROUTER}.gates", "Did you mean 'equal'?"),
    "an inherited value": ({f"{ROUTER}.name": R, f"{ROUTER}.share": "sites"}, f"{ROUTER}.share", "'site'"),
    "an inherited range": ({f"{ADAPTER}.name": f"{M}:Louder", f"{ADAPTER}.rank": 0}, f"{ADAPTER}.rank", ">= 1"),
    "a type": ({f"{ADAPTER}.name": f"{M}:Louder", f"{ADAPTER}.gain": -1.0}, f"{ADAPTER}.gain", "> 0"),
    "no package": ({f"{ROUTER}.name": "nowhere.at:All"}, f"{ROUTER}.name", "has the module nowhere"),
    "no module": ({f"{ROUTER}.name": "mypackage.at:All"}, f"{ROUTER}.name", "mypackage is there, without"),
    "no attribute": ({f"{ROUTER}.name": "mypackage.routers:NearBst"}, f"{ROUTER}.name", "Did you mean 'NearBest'?"),
    "no path": ({f"{ROUTER}.name": "mypackage/routers:NearBest"}, f"{ROUTER}.name", "package.module:Name"),
    "another axis": ({f"{ROUTER}.name": f"{M}:Louder"}, f"{ROUTER}.name", "no subclass of Router"),
    "the base class": ({f"{ROUTER}.name": "molora_jax.routers.base:Router"}, f"{ROUTER}.name", "no subclass of Router"),
    "no class": ({f"{ROUTER}.name": f"{M}:narrow"}, f"{ROUTER}.name", "no subclass of Router"),
    "no function": ({f"{ADAPTER}.init": f"{M}:Louder"}, f"{ADAPTER}.init", "no function"),
    "other arguments": ({f"{ADAPTER}.init": "molora_jax.text:table"}, f"{ADAPTER}.init", "no argument key"),
    "no engine": ({"engine": "mypackage:routers"}, "engine", "does not say MOVES"),
    "no method": ({f"{ROUTER}.name": "mypackage.wrong:NoRoute"}, f"{ROUTER}.name", "no method route"),
    "another signature": ({f"{ROUTER}.name": "mypackage.wrong:Short"}, f"{ROUTER}.name", "cannot be called as route"),
    "no dataclass": ({f"{ROUTER}.name": "mypackage.wrong:Bare"}, f"{ROUTER}.name", "no frozen dataclass"),
    "an option of another type": ({f"{ROUTER}.name": "mypackage.wrong:Odd"}, f"{ROUTER}.name", "int, float, bool"),
    "LIMITS that are none": ({f"{ROUTER}.name": "mypackage.wrong:Limits"}, f"{ROUTER}.name", "(low, high)"),
    "LIMITS of no field": ({f"{ROUTER}.name": "mypackage.wrong:Misspelt"}, f"{ROUTER}.name", "Did you mean 'tau'?"),
    "a default of no type": ({f"{ROUTER}.name": "mypackage.wrong:Absent"}, f"{ROUTER}.name", "a default of type float"),
    "an import that fails": ({f"{ROUTER}.name": "mypackage.broken:All"}, f"{ROUTER}.name", "ZeroDivisionError"),
    "an import that ends": ({f"{ROUTER}.name": "mypackage.ends:All"}, f"{ROUTER}.name", "SystemExit"),
    "a broken line": ({f"{ROUTER}.name": "mypackage.torn:All"}, f"{ROUTER}.name", "torn.py, line 2: def half("),
    "a broken line of another file": (
        {f"{ROUTER}.name": "mypackage.imports_torn:All"}, f"{ROUTER}.name", "torn.py, line 2"
    ),
    "a call that fails elsewhere": ({f"{ROUTER}.name": "mypackage.calls:All"}, f"{ROUTER}.name", "calls.py, line 2"),
    "its axis": ({f"{ROUTER}.name": f"{M}:Louder"}, f"{ROUTER}.name", "It is one of the adapters"),
    "a package it needs": ({f"{ROUTER}.name": "mypackage.needs:All"}, f"{ROUTER}.name", "Install what has the module"),
    "a start that it keeps": (
        {f"{ADAPTER}.name": f"{M}:Forgetful", f"{ADAPTER}.init": "pissa"}, f"{ADAPTER}.init",
        "does not take a start off",
    ),
    "a start from outside": (
        {f"{ADAPTER}.name": f"{M}:Forgetful", f"{ADAPTER}.init": f"{M}:away"}, f"{ADAPTER}.init",
        "does not take a start off",
    ),
    "a site": (
        {"method.rules.attn.placement.name": f"{M}:Values", "method.rules.attn.sites": "o"}, "method.rules.attn.sites",
        "q,v",
    ),
    "a loss": ({"losses.mine.name": f"{M}:Peak", "losses.mine.form": "cube"}, "losses.mine.form", "'plain', 'square'"),
    "a loss of another axis": ({"losses.mine.name": R}, "losses.mine.name", "no subclass of Loss"),
    "an optimizer": ({"optim.name": f"{M}:Lion", "optim.b1": 1.0}, "optim.b1", "in [0, 1)"),
    "an objective": ({"objective.name": f"{M}:Scaled", "objective.by": 2.0}, "objective.by", "in [0.0, 1.0]"),
}  # fmt: skip


@pytest.fixture(scope="module")
def mistakes(package):
    head = "import dataclasses\nfrom typing import ClassVar\nfrom molora_jax.routers.base import Router\n"
    head += "from molora_jax.routers.softmax_topk import SoftmaxTopK\n"
    made = "\n\n@dataclasses.dataclass(frozen=True)\n"
    body = "    def k_max(self, experts):\n        return 1\n"
    whole = f"{body}    def route(self, p, shared, x, ctx):\n        return None\n"
    text = f"{head}{made}class NoRoute(Router):\n{body}\n"
    text += f"{made}class Short(Router):\n{body}    def route(self, p, x):\n        return None\n"
    text += f"{made}class Two(SoftmaxTopK):\n{body}    def route(self, p, shared, x, ctx):\n"
    text += "        found = SoftmaxTopK(k=2).route(p, shared, x, ctx)\n"
    text += "        return found[0].replace(k_max=1), *found[1:]\n"
    text += f"\n\nclass Bare(Router):\n    k: int = 1\n{whole}"
    text += f"{made}class Odd(Router):\n    table: dict = None\n{whole}"
    text += f"{made}class Limits(Router):\n    k: int = 1\n    LIMITS: ClassVar = {{'k': 3}}\n{whole}"
    text += f"{made}class Misspelt(Router):\n    tau: float = 1.0\n    LIMITS: ClassVar = {{'tua': (0, 1)}}\n{whole}"
    text += f"{made}class Absent(Router):\n    tau: float = None\n{whole}"
    (package / "mypackage" / "wrong.py").write_text(text)
    (package / "mypackage" / "broken.py").write_text("1 / 0\n")
    (package / "mypackage" / "torn.py").write_text("import json\ndef half(\n")
    (package / "mypackage" / "imports_torn.py").write_text("import mypackage.torn\n")
    (package / "mypackage" / "calls.py").write_text("import json\njson.loads('{')\n")
    (package / "mypackage" / "ends.py").write_text("raise SystemExit(3)\n")
    (package / "mypackage" / "needs.py").write_text("import nowhere_at_all\n")


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_is_named(name, package, mistakes):
    changes, field, words = WRONG[name]
    with pytest.raises(InputError) as caught:
        schema.validate(mixlora(**changes))
    assert caught.value.where.removeprefix("config.") == field and words in str(caught.value)


def test_a_router_that_selects_more_than_it_says_is_named_before_a_step_is_compiled(package, mistakes):
    compile_model(mixlora(**{f"{ROUTER}.name": R}), families.TINY)
    with pytest.raises(InputError, match="method.rules.ffn.router: got Two.route, which selects 2 experts"):
        compile_model(mixlora(**{f"{ROUTER}.name": "mypackage.wrong:Two"}), families.TINY)


def test_a_class_or_an_instance_in_a_config_is_told_its_name(package):
    from mypackage.routers import NearBest

    from molora_jax.adapters import Lora

    for value, axis, words in (
        (Lora, "adapters", "A config has text: name='lora'"), (Lora(), "adapters", "name='lora'"),
        (NearBest, "routers", f"name='{R}'"), (Lora, "routers", "Lora is one of the adapters"),
    ):  # fmt: skip
        assert words in str(members.member_problem("name", axis, value))
    config = mixlora().to_dict()
    config["method"]["rules"]["ffn"]["adapter"] = Lora()
    with pytest.raises(InputError, match="ffn.adapter: got Lora.*expected a dict of options. .*name='lora'"):
        schema.validate(config)


def test_options_may_be_set_by_flags_and_are_known(package):
    config = mixlora(**{f"{ROUTER}.name": R, f"{ROUTER}.tau": 0.25, "losses.mine.weight": 0.5,
                        "losses.mine.name": f"{M}:Peak"})  # fmt: skip
    assert config.method.rules.ffn.router.tau == 0.25 and config.losses.mine.weight == 0.5
    with pytest.raises(InputError, match="Did you mean 'tau'"):
        mixlora(**{f"{ROUTER}.name": R, f"{ROUTER}.tua": 0.25})


def test_every_axis_of_a_config_has_a_contract():
    axes = {"adapters", "routers", "placements", "losses", "inits", "optim", "objectives", "engines"}
    axes |= {"surgery", "regimes"}
    assert {*outside.OPEN} == axes
    with pytest.raises(InputError, match="takes none from outside"):
        outside.load("backbones", "mypackage.more:Louder", "base")
    for axis, (base, methods) in outside.CONTRACTS.items():
        module = __import__(f"molora_jax.{axis}.base", fromlist=[base])
        assert all(hasattr(getattr(module, base), method) for method in methods), axis
