"""Members from outside the tree: a name with a colon, `package.module:Name`, is imported and held against its contract.

The package's own import and that of the axis's base class bring jax with them; nothing else in this room does. Python
finds the package as it finds any other: installed, or in a folder of PYTHONPATH.
"""

import dataclasses
import importlib
import importlib.util
import inspect
import pathlib
import re
import sys
import traceback
import typing

from molora_jax.config.fields import did_you_mean, wrong

PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)
CONTRACTS = {  # axis: its base class in `molora_jax/<axis>/base.py`, and what that leaves to its members
    "adapters": ("Adapter", ("factors",)),
    "routers": ("Router", ("k_max", "route")),
    "placements": ("Placement", ()),  # `part` or `beside`, see `lacks`
    "losses": ("Loss", ("stats", "value")),
    "optim": ("Optimizer", ("make",)),
    "objectives": ("Objective", ("norm", "loss", "score")),
    "regimes": ("Regime", ("stages",)),
    "surgery": ("Surgery", ("apply",)),
}
INIT = ("key", "site", "rank", "scale", "base", "base_grad")  # arguments of a start, which is a function
ENGINE = ("MOVES", "STORES")  # of an engine, which is a module
OPEN = (*CONTRACTS, "inits", "engines")  # the axes that take members from outside
MISSING = object()
NO_CODE = set()  # folders of runs that were opened: what they hold is data


def is_path(name) -> bool:
    """Whether a config means a member from outside."""
    return isinstance(name, str) and ":" in name


def package(name: str) -> str:
    """`mypackage` of `mypackage.routers:Mine`."""
    return re.split(r"[.:]", name)[0]


def no_code_from(folder) -> None:
    """Refuses members that lie in this folder, a run's, from now on: who opens a run does not run its code."""
    NO_CODE.add(pathlib.Path(folder).resolve())


def load(axis: str, name: str, where: str):
    """The member: a class, or of `inits` a function, of `engines` a module.

    Raises:
      InputError: in the name of `where`: no such path, an import that fails, an object that is no member of the axis.
    """
    text = repr(name)[:200]
    if axis not in OPEN:
        raise wrong(where, text, f"a member of molora_jax/{axis}: this axis takes none from outside")
    if not PATH.fullmatch(name):
        raise wrong(where, text, "package.module:Name of a member from outside", "Correct the path.")
    home, _, attribute = name.partition(":")
    _trusted(package(name), text, where)
    module = _module(home, text, where)
    found = getattr(module, attribute, MISSING)
    if found is MISSING and axis == "engines":
        found = _module(f"{home}.{attribute}", text, where)
    if found is MISSING:
        expected = f"a name that {home} has"
        raise wrong(where, text, expected, did_you_mean(attribute, [n for n in vars(module) if not n.startswith("_")]))
    missing, fix = lacks(axis, found)
    if missing:
        raise wrong(where, f"{text}, {missing}", f"a member of {axis}", fix)
    return found


def member(axis: str, table: dict, name: str):
    """The member of that name: of the axis's table, or from outside."""
    return load(axis, name, axis) if is_path(name) else table[name]


def attribute(member, wanted: str):
    """What a member states (`REFUSES`, `NEEDS`, ...), None where it does not; a start may state it for its module."""
    found = getattr(member, wanted, None)
    if found is None and inspect.isfunction(member):
        found = getattr(inspect.getmodule(member), wanted, None)
    return found


def stated_with(member, wanted: str, method: str):
    """What a class states beside its `method` or below, None where it does not."""
    for cls in inspect.getmro(member):
        if wanted in vars(cls) or method in vars(cls):
            return vars(cls).get(wanted)
    return None


def limits(member) -> dict:
    """LIMITS of the class and of those that it is made from."""
    return {k: v for cls in reversed(inspect.getmro(member)) for k, v in (vars(cls).get("LIMITS") or {}).items()}


def _trusted(top, text, where):
    """Refuses what lies in a run's folder, and Python's own modules, of which some act when they are imported."""
    if top in sys.stdlib_module_names:
        raise wrong(where, f"{text}, a module of Python itself", "a package that derives from molora_jax")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return  # its import says more
    locations = [] if spec is None else [spec.origin, *(spec.submodule_search_locations or ())]
    for location in (pathlib.Path(p).resolve() for p in locations if p and p not in ("built-in", "frozen")):
        if any(location.is_relative_to(folder) for folder in NO_CODE):
            got, expected = f"{text}, which lies inside a run's folder ({location})", "a package that you installed"
            raise wrong(where, got, expected, "Move it elsewhere, if you trust it.")


def _module(home, text, where):
    try:
        return importlib.import_module(home)
    except ModuleNotFoundError as error:
        absent = error.name or home
        if not f"{home}.".startswith(f"{absent}."):
            fix = f"Install what has the module {absent}: {home} imports it."
        elif absent == package(home):
            fix = f"Install the package that has the module {absent}, or add its folder to PYTHONPATH."
        else:
            fix = f"{package(home)} is there, without {absent}: correct the path, or install another version."
        raise wrong(where, f"{text} (no module named {absent!r})", "a module that can be imported", fix) from None
    except (Exception, SystemExit) as error:
        message = str(error).splitlines()[0][:200] if str(error) else ""
        got = f"{text}, whose import fails ({type(error).__name__}: {message})"
        raise wrong(where, got, "a module that can be imported", f"Mend {_fault(home, error)}.") from None


def _fault(home: str, error: BaseException) -> str:
    """`FILE, line N` where an import failed: the last line of the package itself that was reached."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}: {(error.text or '').strip()}"
    machinery = ("<frozen ", __file__, importlib.__file__)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(machinery)]
    own = [f for f in frames if package(home) in pathlib.Path(f.filename).with_suffix("").parts]
    frame = next(iter([*reversed(own), *reversed(frames)]), None)
    return f"the module {home}" if frame is None else f"{frame.filename}, line {frame.lineno}"


def _contract(axis) -> str:
    return f"The contract is molora_jax/{axis}/base.py."


def lacks(axis, found) -> tuple[str, str]:
    """`(what keeps an object from being a member, how to mend it)`; ("", "") for one that is."""
    missing, fix = _lacks(axis, found)
    return missing, missing and (fix or _contract(axis))


def axis_of(kind: type) -> str:
    """The axis of whose contract a class is made, "" for none."""
    homes = {(f"molora_jax.{axis}.base", base): axis for axis, (base, _) in CONTRACTS.items()}
    homes["molora_jax.inits.base", "Start"] = "inits"
    found = (homes.get((cls.__module__, cls.__name__), "") for cls in inspect.getmro(kind))
    return next(filter(None, found), "")


def _lacks(axis, found) -> tuple[str, str]:
    if axis == "inits":
        if not inspect.isfunction(found) and axis_of(found) != "inits":
            return "which is no function, and no Start", ""
        names = inspect.signature(found if inspect.isfunction(found) else found.__call__).parameters
        absent = [name for name in INIT if name not in names]
        return (f"which has no argument {absent[0]}", f"Write init({', '.join(INIT)}).") if absent else ("", "")
    if axis == "engines":
        absent = [name for name in ENGINE if not hasattr(found, name)]
        return (f"which does not say {absent[0]}", "") if absent else ("", "")
    class_name, methods = CONTRACTS[axis]
    contract = getattr(importlib.import_module(f"molora_jax.{axis}.base"), class_name)
    if not (inspect.isclass(found) and issubclass(found, contract)) or found is contract:
        other = axis_of(found) if inspect.isclass(found) and found is not contract else ""
        fix = f"It is one of the {other}." if other else f"Derive it from molora_jax.{axis}.base.{class_name}."
        return f"which is no subclass of {class_name}", fix
    parameters = vars(found).get("__dataclass_params__")
    if parameters is None or not parameters.frozen:
        return "which is no frozen dataclass", "Write @dataclasses.dataclass(frozen=True) above the class."
    for method in methods:
        if getattr(found, method) is getattr(contract, method):
            return f"which has no method {method}", ""
    for method, theirs in inspect.getmembers(contract, inspect.isfunction):
        own = inspect.getattr_static(found, method)
        if not method.startswith("_") and inspect.isfunction(own) and own is not theirs:
            asked = inspect.signature(theirs)
            if not _accepts(inspect.signature(own), asked):
                return f"whose {method} cannot be called as {method}{asked}", f"Write {method}{asked}."
    if axis == "placements" and found.part is contract.part and found.beside is contract.beside:
        return "which has no method part", ""
    if axis == "placements" and not (found.NAMED and found.NAME):
        return "which does not say NAME and NAMED", "Write NAME: ClassVar[str] and NAMED: ClassVar[bool] = True."
    return "", ""


def _accepts(own, asked) -> bool:
    """Whether a call with all arguments of the contract fits a member's own signature."""
    values = asked.parameters.values()
    named = [p.name for p in values if p.kind is p.KEYWORD_ONLY]
    try:
        own.bind(*[None] * (len(values) - len(named)), **dict.fromkeys(named))
    except TypeError:
        return False
    return True


def fields(member, where: str) -> dict:
    """`{option: (annotation, default)}` of a class; the default is dataclasses.MISSING where there is none.

    Raises:
      InputError: in the name of `where`: an annotation that names nothing.
    """
    try:
        hints = typing.get_type_hints(member)
    except (NameError, TypeError, AttributeError) as error:
        raise wrong(where, f"{member.__qualname__}: {error}", "annotations that can be read") from None
    made = [field for field in dataclasses.fields(member) if field.init and not field.name.startswith("_")]
    lazy = {f.name: f.default_factory() for f in made if f.default_factory is not dataclasses.MISSING}
    return {f.name: (hints[f.name], lazy.get(f.name, f.default)) for f in made}
