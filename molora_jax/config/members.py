"""The members of the axes and their options: those of the tree read from their files with `ast`, never imported.

A member is `molora_jax/<axis>/<name>.py` with a line in the table of the axis (`__init__.py`; engines: `base.py`); its
options are the annotated fields of the one dataclass in that file and of the base classes in the same folder. So a
wrong config is refused before jax is loaded. A member from outside has a colon in its name and is imported
(`outside.py`).

There is one way to state what an option may be, wherever the member lives: values with
`over: Literal["site", "layer"] = "site"`, the range of a number with `LIMITS: ClassVar = {"q": (0.01, 2.0)}`. None is
no bound; bounds belong to the range unless a third entry says which do: "(]", "[)" or "()". LIMITS add to those of the
base classes.
"""

import ast
import dataclasses
import functools
import pathlib
import typing

from molora_jax.config import outside
from molora_jax.config.fields import REQUIRED, Field, choice, did_you_mean, interval, one_of, shown, wrong
from molora_jax.errors import InputError

PACKAGE = pathlib.Path(__file__).parents[1]
TABLES = {"engines": "base.py"}  # where an axis lists its members, if not in `__init__.py`
KINDS = {"int": int, "float": float, "bool": bool, "str": str, "tuple": tuple}


def members(axis):
    """Names of an axis, as its table lists them; its files where it has none."""
    return _members(PACKAGE, axis)


@functools.cache  # asked dozens of times a config
def _members(package, axis):
    return tuple(sorted(_listed(axis) or _files(axis)))


def is_member(axis, name) -> bool:
    """Whether there is such a member, in the tree or outside."""
    if outside.is_path(name):
        try:
            return outside.load(axis, name, axis) is not None
        except InputError:
            return False
    return name in members(axis)


def member_problem(where, axis, name, *, among=None):
    """Why a config cannot name this member, as an InputError, or None. `among`: the names to choose from."""
    names = members(axis) if among is None else among
    if outside.is_path(name):
        try:
            outside.load(axis, name, where)
            options(axis, name)
        except InputError as error:
            return error if error.where == where else wrong(where, repr(name), "a member of this axis", str(error))
        return None
    if isinstance(name, str) and name in names:
        return None
    if isinstance(name, str) and name in _files(axis) and unlisted(axis, name):
        file = f"molora_jax/{axis}/{_table(axis)}"
        holds = axis in ("inits", "engines") or _lineage(axis, name)
        fix = f"Add it to {file}." if holds else f"molora_jax/{axis}/{name}.py is a helper: no member is written there."
        return wrong(where, f"{name!r}, which {file} does not list", one_of(names), fix)
    got = "nothing" if name is None else shown(name)
    paths = ", or package.module:Name" if axis in outside.OPEN else ""
    fix = did_you_mean(name, names) or as_text(axis, name)
    return wrong(where, got, f"{one_of(names)}{paths}", fix)


def as_text(axis, value) -> str:
    """What a config says for a member that is given as a class or an instance; "" for anything else."""
    kind = value if isinstance(value, type) else type(value)
    own = outside.axis_of(kind)
    if own != axis:
        return f"{kind.__name__} is one of the {own}." if own else ""
    return f"A config has text: name={classes(axis).get(kind.__name__) or f'{kind.__module__}:{kind.__qualname__}'!r}."


def loss_of(key, options) -> str:
    """The member of an entry of `losses`: its key, unless it says a `name` (keys of a config have no dots)."""
    return options.get("name", key) if hasattr(options, "get") else key


def unlisted(axis, name):
    """Whether a file of the axis holds a dict of members and this one is not in it."""
    names = _listed(axis)
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
    """{option: Field} of a member, with those of its base classes.

    Raises:
      InputError: an option of a type that no config holds, a range that is none; no such member outside.
    """
    if outside.is_path(name):
        member = outside.load(axis, name, name)
        return options_of(member, name) if isinstance(member, type) else {}
    limits, where = _limits(axis, name), f"molora_jax/{axis}/{name}.py"
    found = {o: _field(f"{where}, field {o}", *f) for o, f in _annotations(axis, name).items()}
    return _with_limits(where, found, limits)


def options_of(member, where):
    """The same of a class that was imported; `where` names it."""
    limits = outside.limits(member)
    found = {option: _of_value(f"{where}, field {option}", *f) for option, f in outside.fields(member, where).items()}
    return _with_limits(where, found, limits)


def attribute(axis, name, wanted):
    """The value of a class attribute of a member (its own or inherited), or None; in the tree a literal.

    Of a file without such a class (an init is a function) the value at its top level.
    """
    if outside.is_path(name):
        return outside.attribute(outside.load(axis, name, axis), wanted) if is_member(axis, name) else None
    return _attribute(axis, name, wanted)


def stated_with(axis, name, wanted, method):
    """The same where it is stated beside `method` or below: who writes the method anew states it anew."""
    if outside.is_path(name):
        return outside.stated_with(outside.load(axis, name, axis), wanted, method) if is_member(axis, name) else None
    return _stated_with(axis, name, wanted, method)


@functools.cache
def _stated_with(axis, name, wanted, method):
    found = None
    for body in _bodies(axis, name) if name in members(axis) else ():
        found = None if any(isinstance(n, ast.FunctionDef) and n.name == method for n in body) else found
        found = [found, *_values(body, wanted)][-1]
    return found


@functools.cache
def _attribute(axis, name, wanted):
    if name not in members(axis):  # whatever a config calls a member: it need not be the name of a file
        return None
    found = [value for body in _bodies(axis, name) for value in _values(body, wanted)]
    return found[-1] if found else None


def _limits(axis, name) -> dict:
    return {k: v for body in _bodies(axis, name) for found in _values(body, "LIMITS") for k, v in (found or {}).items()}


def _bodies(axis, name):
    path = PACKAGE / axis / f"{name}.py"
    return [node.body for _, node in _lineage(axis, name)] or ([_module(path).body] if path.is_file() else [])


def _values(body, wanted):
    for item in body:
        targets = item.targets if isinstance(item, ast.Assign) else [getattr(item, "target", None)]
        if any(isinstance(t, ast.Name) and t.id == wanted for t in targets) and getattr(item, "value", None):
            yield _literal(item.value, None)


def _files(axis):
    """Files that may hold a member: not what begins with `_`, and what an axis shares is in its `base.py`."""
    names = (f.stem for f in (PACKAGE / axis).glob("*.py"))
    return [name for name in names if name != "base" and not name.startswith("_")]


def _table(axis):
    return TABLES.get(axis, "__init__.py")


def _listed(axis):
    """Names in the dict of members of an axis, [] where there is none."""
    path = PACKAGE / axis / _table(axis)
    tables = [n.value for n in (_module(path).body if path.is_file() else []) if isinstance(n, ast.Assign)]
    keys = [key for table in tables if isinstance(table, ast.Dict) for key in table.keys]
    return [_literal(key, None) for key in keys if key is not None]


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
        wanted = {ast.unparse(parent).rpartition(".")[2] for parent in node.bases}
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
    """Of an annotation as it is written."""
    default = REQUIRED if default is None else _literal(default, None)
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value).endswith("Literal"):
        allowed = _literal(annotation.slice, ())
        return _choice(allowed if isinstance(allowed, tuple) else (allowed,), default)
    text = ast.unparse(annotation).strip("'\"")
    return _plain(where, text.partition("[")[0], text, default)


def _of_value(where, annotation, default):
    """Of an annotation as Python holds it."""
    default = REQUIRED if default is dataclasses.MISSING else default
    if typing.get_origin(annotation) is typing.Literal:
        return _choice(typing.get_args(annotation), default)
    kind = typing.get_origin(annotation) or annotation
    kinds = (int, float) if kind is float else kind
    if kind in KINDS.values() and default is not REQUIRED and not isinstance(default, kinds):
        fix = 'A value that means "off" is 0 or "".'
        raise wrong(where, repr(default), f"a default of type {kind.__name__}", fix)
    return _plain(where, getattr(kind, "__name__", ""), str(getattr(annotation, "__name__", annotation)), default)


def _choice(allowed, default):
    return dataclasses.replace(choice(*allowed), kind=type(allowed[0]), default=default)


def _with_limits(where, found, limits):
    """The options `found`, each with its entry of LIMITS; an entry of no option is a mistake."""
    for option in limits:
        if option not in found:
            fix = did_you_mean(option, found) or "Take the entry out, or write the field."
            raise wrong(f"{where}, LIMITS", repr(option), f"a field: {', '.join(found)}", fix)
    return {option: _limited(f"{where}, LIMITS of {option}", f, limits.get(option)) for option, f in found.items()}


def _plain(where, kind, text, default):
    if kind not in KINDS:
        raise wrong(where, text, "int, float, bool, str, tuple or Literal", "A config holds no other types.")
    return Field(KINDS[kind], default=default)


def _limited(where, field, limit):
    """The field with its entry of LIMITS."""
    if limit is None:
        return field
    low, high, ends = (*limit, "[]")[:3] if isinstance(limit, tuple) and len(limit) in (2, 3) else (None, None, "")
    numbers = all(bound is None or isinstance(bound, (int, float)) for bound in (low, high))
    if not numbers or ends not in ("[]", "(]", "[)", "()") or field.kind not in (int, float) or field.expected:
        raise wrong(where, repr(limit), '(low, high) of a number, or (low, high, "[)")', "Correct it.")
    return dataclasses.replace(interval(field.kind, low, high, ends), default=field.default)
