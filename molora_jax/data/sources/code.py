"""`code`: from the first line of a docstring to the name of the Python function or class. 4 k items. Metric: exact.

Files: the sources of the running interpreter's standard library (PSF licence), parsed with `ast`, never imported. So
the examples depend on the Python version: it is part of the fingerprint. Left out: tests, tools, tkinter (often not
installed), private names, and docstrings that give the name away. The name is the group: the test asks for names that
were never trained on.
"""

import ast
import os
import pathlib
import re
import sys
import sysconfig
import warnings

from molora_jax.data.example import Example
from molora_jax.errors import InputError

DISTRIBUTION = ""
FILTERS = 1

_SKIPPED = {
    "test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "ensurepip", "turtledemo", "tkinter",
    "pydoc_data", "encodings", "distutils", "__phello__",
}  # fmt: skip


def identity() -> str:
    return "python {}.{}".format(*sys.version_info[:2])


def files():
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    found = []
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in _SKIPPED and not name.startswith("config-")]
        kept = (name for name in names if name.endswith(".py") and not name.startswith("_sysconfigdata"))
        found += [pathlib.Path(folder, name) for name in kept]
    if not found:
        raise InputError(
            "data.tasks, task 'code'",
            got=f"an interpreter without the sources of its standard library at {root}",
            expected="its .py files",
            fix="Use an interpreter that ships them, or take the task out of `data.tasks`.",
        )
    return sorted((path.relative_to(root).as_posix(), path) for path in found)


def examples(files):
    kinds = {ast.FunctionDef: "function", ast.AsyncFunctionDef: "function", ast.ClassDef: "class"}
    for _, path in files:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in old library files
                nodes = list(_definitions(ast.parse(path.read_bytes())))
        except (SyntaxError, ValueError):
            continue  # templates with a .py name
        for node in nodes:
            text = (ast.get_docstring(node) or "").strip()
            line = " ".join(text.split("\n")[0].split())
            if node.name.startswith("_") or not 15 <= len(line) <= 160 or re.search(rf"\b{node.name}\b", line):
                continue
            ask = f"Name of the Python {kinds[type(node)]} that is documented as: {line}"
            yield Example("code", ask, node.name, node.name)


def _definitions(node):
    """Functions and classes of a module and of its classes; not those inside function bodies."""
    for child in getattr(node, "body", []):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield child
        if isinstance(child, ast.ClassDef | ast.If | ast.Try):
            yield from _definitions(child)
