"""The folders `configs/` and `launch/`: beside the package in a clone, inside it where a wheel was installed.

Names as general as these are nobody's to put into site-packages, so a wheel keeps them in the package (`setup.py`), and
they are put up under their own names where they are needed: config files say `from configs import common` in both.
"""

import ast
import importlib
import importlib.util
import os
import pathlib
import re
import sys

from molora_jax.errors import InputError

PACKAGE = pathlib.Path(__file__).parents[1]
STARTS = ("common", "__init__")  # files of configs/ that others start from


def installed() -> bool:
    """Whether this is a wheel's copy."""
    return (PACKAGE / "launch").is_dir()


def folder(name: str) -> pathlib.Path:
    return (PACKAGE if installed() else PACKAGE.parent) / name


def put_up(name: str) -> None:
    """Makes the folder importable as the package `name`, unless one of that name is imported already."""
    if name in sys.modules:
        return
    home = folder(name)
    spec = importlib.util.spec_from_file_location(name, home / "__init__.py", submodule_search_locations=[str(home)])
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


def load_config(config, overrides: dict | None = None):
    """A config as the commands load it: a shipped one by name (`"mixlora"`), or that of a file with `get_config()`.

    Args:
      overrides: fields to change, as `--config.a.b=value` does: `{"train.steps": 20, "base.source": "dir:PATH"}`.

    Returns:
      A checked `ml_collections.ConfigDict`, for `train`, `perform` and `load_base_run`.

    Raises:
      InputError: no such config, an unknown field, a value that does not fit.

    >>> import molora_jax as mj
    >>> config = mj.load_config("mixlora", {"train.steps": 20, "method.rules.ffn.adapter.rank": 4})
    >>> config.train.steps, config.method.rules.ffn.adapter.rank
    (20, 4)
    """
    if not isinstance(config, (str, os.PathLike)):
        raise InputError("config", got=f"a {type(config).__name__}", expected="a name or a file", fix="Such as 'lora'.")
    put_up("launch")
    flags = importlib.import_module("launch.flags")
    as_text = lambda value: ",".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)  # noqa: E731
    made = flags.override(flags.load(config), [(path, as_text(v)) for path, v in (overrides or {}).items()])
    flags.schema.validate(made, need_rules=not made.get("surgery"))
    return made


def configs() -> dict[str, pathlib.Path]:
    """The shipped configs by name."""
    return {file.stem: file for file in sorted(folder("configs").glob("*.py")) if file.stem not in STARTS}


def commands() -> dict[str, pathlib.Path]:
    """The launchers that a command line may name: files of `launch/` with a function `run`."""
    return {
        file.stem: file
        for file in sorted(folder("launch").glob("*.py"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "run" for node in _tree(file).body)
    }


def summary(file: pathlib.Path) -> str:
    """The first sentence of a file's docstring, on one line."""
    first = (ast.get_docstring(_tree(file)) or "").partition("\n\n")[0]
    return re.split(r"(?<!et al)\. ", " ".join(first.split()))[0].rstrip(".")


def _tree(file):
    return ast.parse(file.read_text(encoding="utf-8"))
