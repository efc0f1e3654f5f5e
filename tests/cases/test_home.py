"""`~` is the home folder in every path that a launcher takes: bash hands `--workdir=~/run` on as it stands."""

import importlib
import os
import pathlib
import pkgutil
import shutil

import pytest

import launch
from launch import flags
from molora_jax import runtime
from molora_jax.errors import InputError

MODULES = [f"launch.{m.name}" for m in pkgutil.iter_modules(launch.__path__)] + ["experiments.leaderboard.__main__"]
WITH_FLAGS = [name for name in MODULES if hasattr(importlib.import_module(name), "FLAGS")]
LORA = flags.ROOT / "configs/lora.py"


@pytest.fixture
def home(tmp_path, monkeypatch):
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.mark.parametrize("module", WITH_FLAGS)
def test_every_path_of_every_launcher(module, home, monkeypatch):
    """A path among the flags says so by its metavar; what is a path by its name must have one."""
    found = importlib.import_module(module).FLAGS
    paths = [name for name, keywords in found if keywords.get("metavar", "").startswith(flags.PATHS)]
    assert {name for name, _ in found if name in ("--workdir", "--out", "--against", "--messages")} <= set(paths)
    needed = [f"{n}=x" for n, k in found if k.get("required") and n not in paths]
    shutil.copy(LORA, home / "mine.py")
    argv = ["--config=~/mine.py", *needed, *(f"{name}=~/some/where" for name in paths)]
    config, args = flags.parse("Test.", found, argv, need_config=False)
    assert config.method.rules and args.config == str(home / "mine.py")
    for name in paths:
        several = dict(found)[name].get("action") == "append"
        assert getattr(args, name[2:]) == ([str(home / "some/where")] if several else str(home / "some/where"))


def test_the_words_of_a_separate_argument(home):
    _, args = flags.parse("Test.", [("--workdir", dict(metavar="DIR"))], ["--workdir", "~"], need_config=False)
    assert args.workdir == str(home)


@pytest.mark.parametrize("path", ["~nobody-of-this-name/run", ""])
def test_what_is_no_path_is_refused(path, home):
    for flag in ("--workdir", "--config"):
        argv = {"--workdir": "w", "--config": str(LORA), flag: path}
        with pytest.raises(InputError) as caught:
            flags.parse("Test.", [("--workdir", dict(metavar="DIR"))], [f"{k}={v}" for k, v in argv.items()])
        assert caught.value.where == flag


def test_paths_inside_a_config(home):
    """Those that exist are taken, and an unknown user's is a mistake of that field."""
    (home / "run").mkdir()
    (home / "rows.jsonl").write_text('{"prompt": "a", "target": "b"}\n')
    (home / "model").mkdir()
    (home / "model" / "config.json").write_text("{}")
    fields = {"train.init_from": "{}/run", "data.tasks": "jsonl:{}/rows.jsonl", "base.source": "dir:{}/model",
              "method.rules.all.load": "{}/run"}  # fmt: skip
    for field, text in fields.items():
        argv = [f"--config={LORA}", f"--config.{field}={text.format('~')}"]
        flags.parse("Test.", [], argv)
        with pytest.raises(InputError) as caught:
            flags.parse("Test.", [], [*argv[:1], f"--config.{field}={text.format('~nobody-of-this-name')}"])
        assert caught.value.where.startswith(field)


def test_the_caches(home, monkeypatch):
    monkeypatch.setenv("MOLORA_CACHE", "~/cache")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    runtime.configure()
    assert pathlib.Path(os.environ["JAX_COMPILATION_CACHE_DIR"]) == home / "cache" / "xla"
    monkeypatch.undo()
    assert not pathlib.Path("~").exists()
