"""The command line of every launcher: `--config=FILE.py`, overrides `--config.a.b=value`, and the command's own flags.

A parser of our own on top of argparse, not `ml_collections.config_flags`: that needs absl's global flags, reports a
misspelt key, a wrong type or an error inside the config file as a traceback, accepts NaN, and cannot set an option that
the method knows but the file leaves at its default. Here each mistake is one `InputError`, before jax is imported.
"""

import argparse
import importlib.machinery
import importlib.util
import linecache
import math
import os
import pathlib
import re
import signal
import sys
import traceback

from ml_collections import ConfigDict

from molora_jax import config as schema
from molora_jax import pipes, runtime, stores
from molora_jax.config import shipped
from molora_jax.config.fields import REQUIRED, RULE, Field, did_you_mean, wrong
from molora_jax.config.members import is_member, loss_of, member_problem, members, options
from molora_jax.config.resolve import scaled
from molora_jax.config.values import check_names, there
from molora_jax.errors import InputError, local

ROOT = pathlib.Path(__file__).parents[1]
PATHS = ("DIR", "FILE", "NAME|FILE")  # metavars of flags that are paths: `~` in them is home
OVERRIDE = re.compile(r"--?config\.([^=]*)(=.*)?", re.DOTALL)
AXES = dict(
    adapter="adapters", router="routers", placement="placements", optim="optim", objective="objectives",
    surgery="surgery", regime="regimes", init="inits",
)  # fmt: skip
BOOLS = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}


MESH = (
    "--mesh",
    dict(metavar="AXIS:N,...", help="split the base over devices of this host, as in fsdp:8 or fsdp:4,tensor:2"),
)


def mesh(text: str | None) -> dict[str, int] | None:
    """`fsdp:4,tensor:2` -> `{"fsdp": 4, "tensor": 2}`; the axes and sizes are checked where the mesh is made."""
    if text is None:
        return None
    parts = [part.strip().partition(":")[::2] for part in text.split(",")]
    names = [axis for axis, _ in parts]
    if not all(axis and size.isdigit() for axis, size in parts) or len(set(names)) < len(names):
        raise wrong("--mesh", repr(text), "AXIS:N, several by commas", "Write for instance --mesh=fsdp:8.")
    return {axis: int(size) for axis, size in parts}


def parse(description, flags, argv=None, need_config=True, defaults=None, need_rules=True):
    """Reads a command line.

    Args:
      description: the text above the list of flags in `--help`.
      flags: `(name, kwargs)` pairs for `argparse.add_argument`, such as `("--workdir", dict(required=True))`.
      argv: the arguments; those of the process if None.
      need_config: whether `--config` must be given.
      defaults: `defaults(args) -> ConfigDict` gives the config where `--config` is not given (a run's saved one).
      need_rules: False accepts a config that trains nothing (a surgery).

    A flag whose `metavar` starts with DIR or FILE is a path: `~` is the home folder in it. A flag given twice is
    refused; of an override given twice the last counts, with a note (scripts put theirs before what they were asked).

    Returns:
      `(config, args)`: the validated config with the overrides applied, None where there is none.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(prog=_command(), description=_as_typed(description), allow_abbrev=False)
    what = "a shipped config such as mixlora, or a file with get_config()"
    parser.add_argument("--config", required=need_config, metavar="NAME|FILE.py", help=what)
    for name, keywords in flags:
        parser.add_argument(name, **keywords)
    parser.epilog = "--config.a.b=value changes one field of the config, as in --config.train.steps=20"
    rest, overrides = split(argv)
    several = [name for name, keywords in flags if keywords.get("action") in ("append", "extend", "count")]
    _once(rest, several, overrides)
    args, unknown = parser.parse_known_args(rest)
    if unknown:
        flag, names = unknown[0].partition("=")[0], ["--config", *(name for name, _ in flags)]
        raise wrong(flag, "an unknown flag", "one of " + ", ".join(names), did_you_mean(flag, names))
    for name, keywords in [("--config", dict(metavar="FILE.py")), *flags]:
        field = keywords.get("dest", name.lstrip("-").replace("-", "_"))
        value = getattr(args, field)
        if value is not None and keywords.get("metavar", "").startswith(PATHS):
            paths = [home(name, path) for path in value] if isinstance(value, list) else home(name, value)
            setattr(args, field, paths)
    runtime.environment()  # a member from outside imports jax
    config = load(args.config) if args.config else defaults(args) if defaults else None
    if config is None and overrides:
        raise wrong(f"--config.{overrides[0][0]}", "an override", "a config to change", "Give --config=FILE.py too.")
    if config is not None:
        config = override(config, overrides)
        schema.validate(config, need_rules=need_rules and (need_config or bool(args.config)))
    return config, args


def main(function):
    """Runs `function(argv)`; a user's mistake is one message and exit status 2, Ctrl-C is 130, an output that nobody
    reads any more is 141.

    Ctrl-C ends the process where it is: as an exception it would be swallowed, or come out as another error, inside the
    imports of large packages. What has to be put away first takes the signal for itself (`StopRequest`).
    """
    runtime.keep_memory()
    signal.signal(signal.SIGINT, _interrupted)
    sys.exit(pipes.quietly(lambda: _status(function)) or 0)


def _status(function):
    try:
        return function(sys.argv[1:])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _interrupted(*_):
    os.write(2, b"interrupted\n")
    os._exit(130)


def home(where, path):
    """`~` as the home folder: a shell expands it at the start of a word, but not in `--flag=~/run`."""
    if not path:
        raise wrong(where, "nothing", "a path", "Give it, or leave the flag out.")
    expanded = os.path.expanduser((stores.served if where == "--workdir" else local)(where, path))
    if expanded.startswith("~") and not os.path.exists(expanded):
        raise wrong(where, repr(path), "~/ or ~USER/ of a user of this machine", "Write the folder out.")
    return expanded


def _once(rest, several, overrides):
    """Refuses a flag that is given twice; says which value of an override counts."""
    given = [argument.partition("=")[0] for argument in rest if argument.startswith("--")]
    for name in dict.fromkeys(given):
        if given.count(name) > 1 and name not in several:
            raise wrong(name, f"{given.count(name)} times", "it once", "Leave all but one out.")
    paths = [path for path, _ in overrides]
    for path, text in dict(overrides).items():
        if paths.count(path) > 1:
            print(f"note: --config.{path} is given {paths.count(path)} times; the last counts: {text}", file=sys.stderr)


def load(path):
    """The ConfigDict that `get_config()` returns, of a shipped config by name or of a file."""
    file, names = pathlib.Path(home("--config", path)), shipped.configs()
    if not there(file.is_file):
        if str(path) not in names:
            raise _no_config(path, file, names)
        file = names[str(path)]
    shipped.put_up("configs")  # config files inherit from `configs.common`
    try:
        spec = importlib.util.spec_from_loader("_config", _Config("_config", str(file)))
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if not callable(getattr(module, "get_config", None)):
            raise wrong("--config", f"{str(path)!r} without get_config", "a function get_config() -> ConfigDict")
        config = module.get_config()
    except InputError:
        raise
    except SyntaxError as error:
        where = f"{error.filename}, line {error.lineno}"
        raise wrong(where, repr((error.text or "").strip()), f"Python ({error.msg})", "Correct that line.") from None
    except (Exception, SystemExit) as error:
        raise _inside(file, error) from None
    if not isinstance(config, (dict, ConfigDict)):
        raise wrong("--config", f"get_config() -> {type(config).__name__}", "a ConfigDict", "Return the config.")
    check_names(config)
    return config if isinstance(config, ConfigDict) else ConfigDict(config)


class _Config(importlib.machinery.SourceFileLoader):
    """Leaves no `__pycache__` beside a user's file, nor believes one that lies there."""

    def get_code(self, name):
        return self.source_to_code(self.get_data(self.path), self.path)


def _no_config(path, file, names):
    """Nearest to a name are the shipped ones; to a path the files beside it."""
    fix = did_you_mean(str(path), names)
    if len(file.parts) > 1 or file.suffix:
        beside = [str(f) for f in file.parent.glob("*.py")] if there(file.parent.is_dir) else []
        fix = did_you_mean(str(file), [f for f in beside if not f.endswith("__init__.py")])
        fix = fix or did_you_mean(file.stem, names)
    expected = f"one of {', '.join(names)}, or a Python file with get_config()"
    return wrong("--config", f"{str(path)!r} (no such file, or a folder)", expected, fix)


def override(config, overrides):
    """A copy with `(path, text)` pairs applied; a value takes the type of the field that it replaces."""
    config = config.copy_and_resolve_references() if hasattr(config, "copy_and_resolve_references") else config
    later, budget = [], _budget(config)
    with config.unlocked():
        _switch_on(config, [path.split(".") for path, _ in overrides])
        for path, text in overrides:
            group, key = _find(config, path)
            if key == "init" and isinstance(group.get(key), ConfigDict):  # another start has other options
                group[key] = ConfigDict(dict(name=text))
            elif key in group:
                group[key] = _typed(f"config.{path}", text, group[key])
            else:
                later.append((path, text))  # an option that the file leaves out: after a change of `name`
        for path, text in sorted(later, key=lambda item: not item[0].endswith(".name")):
            group, key = _find(config, path)
            keys = path.split(".")[:-1]
            if key == "name" and (keys[0] == "losses" or not len(group) and keys[-1] in AXES):
                group[key] = text  # of a loss; of a group that the file leaves empty, such as a stage's objective
                continue
            own = _options(group, keys)
            if key not in own:
                raise _unknown(path, text, sorted({*group.keys(), *own}))
            group[key] = _typed(f"config.{path}", text, own[key].kind())
        if "train.steps" in dict(overrides):
            _scale_stages(config, budget, {path for path, _ in overrides})
    return config


def _unknown(path, text, names):
    """The error for a field that a group neither has nor takes."""
    *keys, key = path.split(".")
    if keys == ["losses"] and is_member("losses", key):
        fix = f"Switch it on by --config.{path}.weight={text}."
        expected = f"a group of the loss's options ({', '.join(options('losses', key))})"
        return wrong(f"config.{path}", repr(text), expected, fix)
    if keys == ["losses"]:
        near = did_you_mean(key, members("losses"))
        fix = near and f"{near} A loss is switched on by its weight: --config.losses.NAME.weight={text}."
        return wrong(f"config.{path}", "an unknown loss", "one of " + ", ".join(members("losses")), fix)
    if not names and keys and keys[-1] in AXES:
        group = f"--config.{'.'.join(keys)}"
        fix = f"Give {group}.name too: one of {', '.join(members(AXES[keys[-1]]))}."
        return wrong(f"config.{path}", "an option of nothing: this group is empty", f"a member in {group}.name", fix)
    expected = "one of " + ", ".join(names) if names else "nothing: this group is empty"
    return wrong(f"config.{path}", "an unknown field", expected, did_you_mean(key, names))


def _budget(config):
    """`train.steps`, where it says how many steps there are."""
    train = config.get("train")
    steps = train.get("steps") if isinstance(train, ConfigDict) and not train.get("epochs") else None
    return steps if isinstance(steps, int) and steps > 0 else None


def _scale_stages(config, before, given):
    """Stages of so many steps keep their parts of `train.steps`, where the command line does not say their own."""
    stages = config.get("schedule")
    after = _budget(config)
    if before is None or after is None or not isinstance(stages, ConfigDict):
        return
    named = [name for name in sorted(stages) if f"schedule.{name}.steps" not in given]
    counts = [stages[name].get("steps") if isinstance(stages[name], ConfigDict) else None for name in named]
    if len(named) < len(stages) or not all(isinstance(n, int) and n >= 0 for n in counts) or not any(counts):
        return
    new = scaled(counts, before, after)
    for name, count in zip(named, new, strict=True):
        stages[name].steps = count
    if new != counts:
        text = ", ".join(map(str, counts)), ", ".join(map(str, new))
        print(f"note: stages of {text[0]} of {before} steps have {text[1]} of {after}", file=sys.stderr)


def _switch_on(config, paths):
    """Adds what overrides name and the file leaves out: losses (`--config.losses.z_loss.weight=1e-3`), the router of a
    rule that has none (`--config.method.rules.all.router.name=softmax_topk`), options of its start."""
    losses = config.get("losses")
    for _, _, name, *keys in (keys for keys in paths if len(keys) > 4 and keys[:2] == ["method", "rules"]):
        rule = config.method.rules.get(name) if "method" in config else None
        if not isinstance(rule, ConfigDict):
            continue
        if keys == ["router", "name"] and "router" not in rule:
            rule.router = ConfigDict()
        if keys[:2] == ["adapter", "init"] and len(keys) == 3 and isinstance(rule.adapter.get("init"), str):
            with rule.adapter.ignore_type():
                rule.adapter.init = ConfigDict(dict(name=rule.adapter.init))
    named = {keys[1] for keys in paths if len(keys) == 3 and keys[0] == "losses" and keys[2] == "name"}
    for keys in paths:
        if len(keys) == 3 and keys[0] == "losses" and isinstance(losses, ConfigDict) and keys[1] not in losses:
            if keys[1] not in named and not is_member("losses", keys[1]):
                names, where = members("losses"), f"config.losses.{keys[1]}"
                fix = did_you_mean(keys[1], names) or f"Or give {where}.name=package.module:Name, one of your own."
                raise wrong(where, "an unknown loss", "one of " + ", ".join(names), fix)
            losses[keys[1]] = ConfigDict()


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise wrong("command line", message, "the flags that --help lists")


def _command():
    if sys.argv[0].startswith("molora "):
        return sys.argv[0]
    main_module = getattr(sys.modules.get("__main__"), "__spec__", None)
    return f"python -m {main_module.name if main_module else pathlib.Path(sys.argv[0]).stem}"


def _as_typed(description):
    """A launcher's docstring in the words of the command `molora`, where that was typed."""
    if not sys.argv[0].startswith("molora "):
        return description
    return re.sub(r"configs/(\w+)\.py", r"\1", description.replace("python -m launch.", "molora "))


def split(argv):
    """Takes `--config.path=value` and `--config.path value` out of the arguments."""
    rest, overrides, queue = [], [], list(argv)
    while queue:
        argument = queue.pop(0)
        match = OVERRIDE.fullmatch(argument)
        if not match:
            rest.append(argument)
            continue
        if match[2] is None and (not queue or queue[0].startswith("--")):
            raise wrong(argument, "no value", f"{argument}=VALUE")
        overrides.append((match[1], match[2][1:] if match[2] is not None else queue.pop(0)))
    return rest, overrides


def _find(config, path):
    """The group that holds the last key of a dotted path."""
    keys, group = path.split("."), config
    for depth, key in enumerate(keys[:-1]):
        if key not in group or not isinstance(group[key], ConfigDict):
            where = "config." + ".".join(keys[: depth + 1])
            if key in group:
                raise wrong(where, f"a field in {path!r}", f"a group; {key} is the value {group[key]!r}")
            expected = "one of " + ", ".join(group.keys()) if len(group) else "nothing: this group is empty"
            raise wrong(where, "an unknown field", expected, did_you_mean(key, group.keys()))
        group = group[key]
    return group, keys[-1]


def _options(group, keys):
    """Options of a group's member, or fields of a rule, that the file may leave at their defaults."""
    if len(keys) == 3 and keys[:2] == ["method", "rules"]:
        return {name: field for name, field in RULE.items() if field.default is not REQUIRED}
    axis = AXES.get(keys[-1] if keys else "")
    name = group.get("name") if axis else loss_of(keys[1], group) if len(keys) == 2 and keys[0] == "losses" else None
    axis = axis or "losses"
    if name is not None and not is_member(axis, name):
        problem = member_problem(f"config.{'.'.join(keys)}.name", axis, name)
        if problem:
            raise problem
    own = options(axis, name) if is_member(axis, name) else {}
    return own | {"inputs": Field(tuple)} if own and axis == "surgery" else own


def _typed(where, text, default):
    if isinstance(default, ConfigDict):
        names = ", ".join(f"{where}.{key}" for key in default) or _first_of(where)
        raise wrong(where, repr(text), "one field, not a group", f"Use {names}.")
    try:
        if isinstance(default, bool):
            return BOOLS[text.strip().lower()]
        if isinstance(default, int):
            return int(text)
        if isinstance(default, float):
            if not math.isfinite(float(text)):
                raise wrong(where, repr(text), "a finite number")
            return float(text)
        if isinstance(default, (tuple, list)):
            return type(default)(part.strip() for part in text.split(",") if part.strip())
        if isinstance(default, str):
            return text
    except InputError:
        raise
    except (ValueError, KeyError):
        names = {bool: "true or false", int: "an integer", float: "a number"}
        raise wrong(where, repr(text), names[type(default)], f"Its value is {default!r} now.") from None
    raise wrong(where, repr(text), f"a field that text can set, not a {type(default).__name__}", "Change the file.")


def _first_of(where):
    """What to set first in a group that is empty."""
    if where.rpartition(".")[2] in AXES:
        return f"{where}.name"
    return f"{where}.NAME.weight" if where == "config.losses" else "a config file, as this group is empty"


def _inside(file, error):
    """An error in the user's own file: its last line there, not our traceback."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(file)]
    line = frames[-1].lineno if frames else 0
    text = linecache.getline(str(file), line).strip() if line else str(file)
    message = str(error).splitlines()[0] if str(error) else ""
    return wrong(f"{file}, line {line}", repr(text), "code that runs", f"{type(error).__name__}: {message}")
