"""Arrows point down only: which room may import which, read from the imports of every file."""

import ast
import importlib
import pathlib
import re

PACKAGE = pathlib.Path(__file__).parents[1] / "molora_jax"
OURS = ("molora_jax", "kernels_pallas", "launch", "configs", "experiments", "tests")
# From the ground up; rooms of one line may not import each other. (kernels_pallas lies below core.)
FLOORS = (
    ("errors",),
    ("stores",),
    ("config", "cluster", "text", "pictures", "pipes"),
    ("runtime",),
    ("core",),
    ("sharding",),
    ("inits", "optim"),
    ("adapters", "routers", "losses"),
    ("placements",),
    ("engines",),
    ("backbones", "modules"),
    ("objectives",),
    ("io",),
    ("data",),
    ("runs",),
    ("regimes",),
    ("training", "decode"),
    ("evaluation", "surgery"),
    ("export", "comparing", "serving"),
    ("catalogue",),
    ("__main__",),
    ("",),  # the public library, `molora_jax/__init__.py`
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def room_of(path: pathlib.Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return "" if first == "__init__.py" else first.removesuffix(".py")


def imported(path: pathlib.Path):
    """`(line, room)` of every import of the package in a file, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            package, *rest = name.split(".")
            if package == "molora_jax" and rest:
                yield node.lineno, rest[0]


def test_every_room_has_a_floor():
    rooms = {room_of(path) for path in PACKAGE.rglob("*.py")}
    assert rooms == set(FLOOR), "add the room to FLOORS, or remove it"


def test_arrows_point_down():
    wrong = [
        f"{path.relative_to(PACKAGE.parent)}:{line} imports {room}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for line, room in imported(path)
        if room != room_of(path) and FLOOR.get(room, 99) >= FLOOR[room_of(path)]
    ]
    assert not wrong, "\n".join(wrong)


def test_nothing_below_imports_the_outside():
    """The package imports neither launchers, configs, experiments nor tests; kernels import nothing of the package."""
    above = ("launch", "configs", "experiments", "tests")
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in above, f"{path}:{node.lineno}"
    kernels = PACKAGE.parent / "kernels_pallas"
    for path in sorted(kernels.rglob("*.py")):
        assert "molora_jax" not in {name.split(".")[0] for name in _modules(path)}, path


def _modules(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_members_are_named_in_their_own_rooms():
    """No check of the config names a member, and nobody but placements asks a placement by its name."""
    sites = {"ffn"}  # of a block too
    members = {f.stem for axis in ("adapters", "routers", "placements", "losses", "inits")
               for f in (PACKAGE / axis).glob("*.py")} - {"__init__", "base"} - sites  # fmt: skip
    for path in sorted((PACKAGE / "config").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):  # a table of a field's values may have the word of a member
                named = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
                assert not named & members, f"{path}:{node.lineno} names {named & members}"
    for path in sorted(PACKAGE.rglob("*.py")):
        if room_of(path) != "placements":
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.Eq, ast.NotEq)):
                    assert not re.search(r"\bplacement\b|\.NAME\b", ast.unparse(node.left)), f"{path}:{node.lineno}"


def test_what_is_read_of_our_modules_is_there():
    """`module.name` in a line that no test runs: a rename that missed it is seen here."""
    wrong = []
    for package in OURS:
        for path in sorted((PACKAGE.parent / package).rglob("*.py")):
            wrong += _absent(path)
    assert not wrong, "\n".join(wrong)


def _absent(path: pathlib.Path):
    tree, modules, bound = ast.parse(path.read_text(encoding="utf-8")), {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in OURS:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                if _file(name):
                    modules[alias.asname or alias.name] = name
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            bound.add(node.id)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and isinstance(node.value, ast.Name):
            name = modules.get(node.value.id) if node.value.id not in bound else None
            if name and not hasattr(importlib.import_module(name), node.attr) and not _file(f"{name}.{node.attr}"):
                yield f"{path.relative_to(PACKAGE.parent)}:{node.lineno}: {name} has no {node.attr}"


def _file(name: str) -> bool:
    """Whether there is a module or a package of ours of this name."""
    place = PACKAGE.parent.joinpath(*name.split("."))
    return place.with_suffix(".py").exists() or (place / "__init__.py").exists()
