"""The folders `configs/` and `launch/`: beside the package in a clone, inside it where a wheel was installed.

Names as general as these are nobody's to put into site-packages, so a wheel keeps them in the package (`setup.py`), and
they are put up under their own names where they are needed: config files say `from configs import common` in both.
"""

import ast
import importlib.util
import pathlib
import re
import sys

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
