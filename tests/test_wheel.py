"""An installation without the clone: the command `molora`, shipped configs by name, a wheel of what runs need."""

import fnmatch
import importlib.metadata
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib
import types
import zipfile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from launch import flags
from molora_jax.config import shipped
from molora_jax.errors import InputError

ROOT = pathlib.Path(__file__).parents[1]
SOURCES = ("molora_jax", "kernels_pallas", "configs", "launch")
FILES = ("setup.py", "MANIFEST.in", "pyproject.toml", "README.md", "LICENSE")
TINY = ["--config.base.source=random:tiny", "--config.train.steps=3"]


def python(*arguments, cwd, path=None, executable=sys.executable):
    """A process that sees nothing of the clone, unless `path` says so."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "XLA_FLAGS")}
    environment |= {"PYTHONPATH": str(path)} if path else {}
    done = subprocess.run([str(executable), *arguments], cwd=cwd, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The files of a wheel as its build lays them out: the packages that pyproject.toml asks for, then setup.py's."""
    folder = tmp_path_factory.mktemp("built")
    said = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    asked = said["packages"]["find"]["include"]
    files = [file for name in os.listdir(ROOT) if name[0] != "." for file in (ROOT / name).rglob("*.py")]
    for file in (file.relative_to(ROOT) for file in files):
        if any(fnmatch.fnmatchcase(".".join(file.parent.parts), pattern) for pattern in asked):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, folder / file)
    for package, patterns in said["package-data"].items():
        for file in (file for pattern in patterns for file in (ROOT / package).glob(pattern)):
            (folder / file.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, folder / file.relative_to(ROOT))
    with pytest.MonkeyPatch.context() as patch:  # setuptools itself need not be there
        for name in ("setuptools", "setuptools.command", "setuptools.command.build_py"):
            patch.setitem(sys.modules, name, types.SimpleNamespace(setup=None, build_py=object))
        spec = importlib.util.spec_from_file_location("_setup", ROOT / "setup.py")
        setup = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(setup)
    setup.put_inside(folder)
    return folder


def expected():
    """What a wheel holds: every module of the package, and whatever else lies in it under version control."""
    tracked = subprocess.run(["git", "ls-files", *SOURCES], cwd=ROOT, capture_output=True, text=True).stdout.split()
    here = {p.relative_to(ROOT).as_posix() for name in SOURCES for p in (ROOT / name).rglob("*.py")}
    here |= {name for name in tracked if not name.endswith((".py", ".sh", ".sbatch", ".yaml"))}
    inside = lambda name: f"molora_jax/{name}" if name.startswith(("configs/", "launch/")) else name  # noqa: E731
    return {inside(name) for name in here if name not in ("launch/docs.py", "launch/pages.py")}


def test_a_wheel_has_what_runs_need_and_nothing_else(built):
    assert {p.relative_to(built).as_posix() for p in built.rglob("*") if p.is_file()} == expected()


def test_a_wheels_copy_finds_its_commands_and_configs(built, tmp_path):
    """Run from there, without the clone: help, a config by name, the defaults of an older config, a mistake."""
    code, told, _ = python("-m", "molora_jax", "--help", cwd=tmp_path, path=built)
    assert (
        code == 0 and re.search(r"^  train +Trains a run", told, re.M) and re.search(r"^  mixlora +MixLoRA", told, re.M)
    )
    assert "docs" not in told.split("configs that ship")[0].split()
    code = "import sys; from molora_jax.config import defaults, shipped; shipped.put_up('launch'); " \
           "from launch import flags; config = flags.load('mixlora'); flags.schema.validate(config); " \
           "assert defaults.rule_fields()['down'] == 'once' and config.losses.balance.over == 'all'; " \
           "sys.exit('jax' in sys.modules)"  # fmt: skip
    assert python("-c", code, cwd=tmp_path, path=built)[::2] == (0, "")
    code, _, said = python("-m", "molora_jax", "train", "--config=mixlor", "--workdir=x", cwd=tmp_path, path=built)
    assert code == 2 and "Did you mean 'mixlora'?" in said and "Traceback" not in said


@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_constraints_say_a_version_of_all_that_the_tests_install(python):
    """What is left open pip has to search: with the two stores of `--all` open it gave up after a minute."""
    lines = (ROOT / f"constraints-py{python.replace('.', '')}.txt").read_text().splitlines()
    pinned = {canonicalize_name(line.partition("==")[0]) for line in lines if not line.startswith("#")}
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    todo, seen = [("molora-jax", frozenset({"data", "test", "test-all"}))], set()
    while todo:
        name, extras = todo.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            asked = [Requirement(line) for line in importlib.metadata.requires(name) or ()]
        except importlib.metadata.PackageNotFoundError:
            continue  # of an extra that is not installed here: what it asks for is seen with --all
        for one in asked:
            if one.marker is None or any(one.marker.evaluate({**environment, "extra": e}) for e in {*extras, ""}):
                todo.append((canonicalize_name(one.name), frozenset(one.extras)))
    assert len(seen) > 100 and {name for name, _ in seen} - pinned <= {"molora-jax", "setuptools"}


def test_commands_are_the_launchers_with_a_run():
    found = {p.stem for p in (ROOT / "launch").glob("*.py") if re.search(r"^def run\(argv\)", p.read_text(), re.M)}
    assert set(shipped.commands()) == found >= {"train", "evaluate", "generate", "verify", "bench", "profile"}
    assert all(shipped.summary(file) for file in (*shipped.commands().values(), *shipped.configs().values()))


def test_help_loads_no_jax(tmp_path):
    code = "import sys; from molora_jax.__main__ import main; main(['--help']); main(['--version']); " \
           "sys.exit(bool({'jax', 'launch', 'ml_collections'} & sys.modules.keys()))"  # fmt: skip
    code, told, _ = python("-c", code, cwd=tmp_path, path=ROOT)
    assert code == 0 and "molora_jax 0." in told
    for name in shipped.commands():
        assert f"  {name} " in told
    code, _, said = python("-m", "molora_jax", "trian", cwd=tmp_path, path=ROOT)
    assert code == 2 and "Did you mean 'train'?" in said


def test_a_commands_own_help_is_in_its_words(tmp_path):
    code, told, _ = python("-m", "molora_jax", "train", "--help", cwd=tmp_path, path=ROOT)
    assert code == 0 and "usage: molora train" in told and "--config=mixlora" in " ".join(told.split())
    assert "python -m launch" not in told


@pytest.mark.parametrize("name", shipped.configs())
def test_a_shipped_config_has_a_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert flags.load(name) == flags.load(ROOT / "configs" / f"{name}.py")


@pytest.mark.parametrize("given, near", [("mixlroa", "'mixlora'"), ("mixlora.py", "'mixlora'"), ("common", "")])
def test_an_unknown_name_gets_the_nearest(given, near, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        flags.load(given)
    assert caught.value.where == "--config" and near in caught.value.fix
    assert "mixlora, moa_hetero" in caught.value.expected


def test_a_path_wins_over_a_name(tmp_path, monkeypatch):
    (tmp_path / "mixlora").write_text("def get_config():\n    return {'a': 1}\n")
    monkeypatch.chdir(tmp_path)
    assert flags.load("mixlora").a == 1


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A virtual environment with the wheel and what it asks for, by pip; without a network, from this environment."""
    folder = tmp_path_factory.mktemp("environment")
    sources = folder / "sources"  # a copy, so that building writes nothing into the clone
    for name in SOURCES:
        shutil.copytree(ROOT / name, sources / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, sources)
    (sources / "tests").mkdir()
    (sources / "tests" / "__init__.py").touch()
    pip = ["-m", "pip", "--disable-pip-version-check", "-q"]
    code, told, said = python(*pip, "wheel", "--no-deps", "-w", str(folder), str(sources), cwd=folder)
    assert code == 0, told + said
    (wheel,) = folder.glob("*.whl")
    assert python("-m", "venv", str(folder / "venv"), cwd=folder)[0] == 0
    own = folder / "venv" / "bin" / "python"
    constraints = ROOT / f"constraints-py3{sys.version_info[1]}.txt"
    bound = ["-c", str(constraints)] if constraints.exists() else []
    code, told, said = python(*pip, "install", *bound, f"{wheel}[data]", cwd=folder, executable=own)
    if code:
        assert "connect" in (told + said).lower() or "No matching distribution" in said, told + said
        assert python(*pip, "install", "--no-deps", str(wheel), cwd=folder, executable=own)[0] == 0
        (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
        (packages,) = {p for p in sys.path if p.endswith("site-packages")}
        (site / "borrowed.pth").write_text(f"{packages}\n")  # its own .pth files, the clone's among them, do not count
    return folder, wheel


@pytest.mark.slow
def test_the_wheel_works_in_an_empty_environment(environment, tmp_path):
    folder, wheel = environment
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if ".dist-info/" not in name} == expected()

    def molora(*arguments):
        executable = folder / "venv" / "bin" / "molora"
        code, told, said = python(*arguments, cwd=tmp_path, executable=executable)
        assert code == 0, told + said
        return told

    assert "mixlora" in molora("--help")
    molora("train", "--config=mixlora", "--workdir=run", *TINY)
    assert "step 3" in molora("evaluate", "--workdir=run", "--config.eval.num_items=4", "--config.eval.num_generated=2")
    assert molora("generate", "--workdir=run", "--prompt=Hello", "--max_new_tokens=4").strip() is not None
    assert "valid" in molora("verify", "--workdir=run")
    molora("bench", "--config=mixlora", TINY[0], "--batch=2", "--seq=32", "--steps=1")
    where = "import molora_jax, sys; print(molora_jax.__file__)"
    code, told, _ = python("-c", where, cwd=tmp_path, executable=folder / "venv" / "bin" / "python")
    assert code == 0 and str(folder) in told


@pytest.mark.slow
def test_the_snippets_of_the_library_page_run_from_the_wheel(environment, tmp_path):
    text = (ROOT / "docs" / "library.md").read_text()
    (tmp_path / "snippets.py").write_text("\n".join(re.findall(r"```python\n(.*?)```", text, re.S)))
    done = python("snippets.py", cwd=tmp_path, executable=environment[0] / "venv" / "bin" / "python")
    assert done[0] == 0, done[2]
