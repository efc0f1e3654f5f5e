"""The members of the method axes and their options, read from their files with `ast`, never imported.

A member is `molora_jax/<axis>/<name>.py`; its options are the annotated fields of the one dataclass in that file and of
the base classes in the same folder. So a new member needs no row in a table, and a wrong config is refused before jax
is loaded. A member states allowed values with `over: Literal["site", "layer"] = "site"`, and the range of a number with
`LIMITS: ClassVar = {"q": (0.01, 2.0)}` (closed; None is no bound).
"""

import ast
import dataclasses
import functools
import pathlib

from molora_jax.config.fields import RANGES, REQUIRED, Field, choice, within, wrong

PACKAGE = pathlib.Path(__file__).parents[1]
NOT_MEMBERS = ("__init__", "base", "held_out")


def members(axis):
    """Names of an axis: its files, but those that members share."""
    files = (PACKAGE / axis).glob("*.py")
    return tuple(sorted(f.stem for f in files if f.stem not in NOT_MEMBERS and not f.stem.startswith("_")))


def unlisted(axis, name, file="__init__.py"):
    """Whether a file of the axis holds a dict of members and this one is not in it."""
    path = PACKAGE / axis / file
    tables = [n.value for n in (_module(path).body if path.is_file() else []) if isinstance(n, ast.Assign)]
    names = [_literal(key, None) for t in tables if isinstance(t, ast.Dict) for key in t.keys if key is not None]
    return bool(names) and name not in names


@functools.cache
def classes(axis):
    """{class: file} of an axis: its contract in `base.py`, and every public dataclass that descends from it."""
    names = [f.stem for f in sorted((PACKAGE / axis).glob("*.py")) if not f.stem.startswith("_")]
    found = {name: _lineage(axis, name) for name in names if name != "base"}
    found = {name: lineage for name, lineage in found.items() if lineage and lineage[0][0].stem == "base"}
    contracts = {lineage[0][1].name: "base" for lineage in found.values()}
    return contracts | {lineage[-1][1].name: name for name, lineage in found.items()}


@functools.cache
def options(axis, name):
    """{option: Field} of a member, with those of its base class in `base.py` or another member's file."""
    ranges = RANGES.get(axis, {})
    fields, limits = {}, attribute(axis, name, "LIMITS") or {}
    for option, (annotation, default) in _annotations(axis, name).items():
        field = _field(f"molora_jax/{axis}/{name}.py, field {option}", annotation, default)
        limit = within(*limits[option]) if option in limits else ranges.get(option)
        if limit is not None and limit.kind is field.kind and not field.expected:
            field = dataclasses.replace(limit, default=field.default)
        elif limit is not None and (limit.kind, field.kind) in ((int, float), (float, int)):
            field = dataclasses.replace(limit, kind=field.kind, default=field.default)
        fields[option] = field
    return fields


@functools.cache
def attribute(axis, name, wanted):
    """The literal value of a class attribute of a member (its own or inherited), or None.

    Of a file without such a class (an init is a function) the value at its top level.
    """
    if name not in members(axis):  # whatever a config calls a member: it need not be the name of a file
        return None
    found, path = None, PACKAGE / axis / f"{name}.py"
    bodies = [node.body for _, node in _lineage(axis, name)] or ([_module(path).body] if path.is_file() else [])
    for body in bodies:
        for item in body:
            targets = item.targets if isinstance(item, ast.Assign) else [getattr(item, "target", None)]
            if any(isinstance(t, ast.Name) and t.id == wanted for t in targets) and getattr(item, "value", None):
                found = _literal(item.value, None)
    return found


@functools.cache
def _module(path):
    try:
        return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    except SyntaxError as error:
        line = repr((error.text or "").strip())
        raise wrong(f"{path}, line {error.lineno}", line, f"Python ({error.msg})", "Correct that line.") from None


def _is_dataclass(node):
    return any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)


def _classes(path):
    return [node for node in _module(path).body if isinstance(node, ast.ClassDef)] if path.is_file() else []


def _lineage(axis, name):
    """(file, class node) from the oldest base class in the axis folder down to the member's dataclass."""
    path = PACKAGE / axis / f"{name}.py"
    public = [node for node in _classes(path) if _is_dataclass(node) and not node.name.startswith("_")]
    if not public:
        return []
    lineage = [(path, public[-1])]
    while True:
        path, node = lineage[0]
        wanted = {ast.unparse(base).rpartition(".")[2] for base in node.bases}
        imports = [item for item in _module(path).body if isinstance(item, ast.ImportFrom)]
        stems = [
            item.module.rpartition(".")[2] for item in imports if item.module
        ]  # from molora_jax.axis.stem import C
        stems += [alias.name for item in imports for alias in item.names]  # from molora_jax.axis import stem
        files = [path, *(PACKAGE / axis / f"{stem}.py" for stem in ["base", *stems])]
        parents = [(f, c) for f in files for c in _classes(f) if c.name in wanted and c is not node]
        if not parents or len(lineage) > 8:
            return lineage
        lineage.insert(0, parents[0])


def _annotations(axis, name):
    found = {}
    for _, node in _lineage(axis, name):
        for item in node.body:
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                text = ast.unparse(item.annotation)
                if not text.startswith(("ClassVar", "typing.ClassVar")) and not item.target.id.startswith("_"):
                    found[item.target.id] = (item.annotation, item.value)
    return found


def _literal(node, otherwise):
    try:
        return ast.literal_eval(node)
    except ValueError:
        return otherwise


def _field(where, annotation, default):
    default = REQUIRED if default is None else _literal(default, None)
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value).endswith("Literal"):
        allowed = _literal(annotation.slice, ())
        allowed = allowed if isinstance(allowed, tuple) else (allowed,)
        return dataclasses.replace(choice(*allowed), kind=type(allowed[0]), default=default)
    text = ast.unparse(annotation).strip("'\"")
    kinds = {"int": int, "float": float, "bool": bool, "str": str, "tuple": tuple}
    kind = kinds.get(text.partition("[")[0])
    if kind is None:
        raise wrong(where, text, "int, float, bool, str, tuple or Literal", "A config holds no other types.")
    return Field(kind, default=default)
