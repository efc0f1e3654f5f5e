"""Wrong configs made from the schema: every field with a wrong type, value, name or container.

Each must be refused by name, before jax is imported: the tries run in a process that never imports it.
"""

import dataclasses
import json
import math
import os
import subprocess
import sys

from launch import flags
from molora_jax import config as config_lib
from molora_jax.config import fields as known
from molora_jax.config.members import options
from tests.faults.common import base_folder, tiny_config
from tests.faults.report import CHANNEL, Failure, each, refused

OF_ANOTHER_TYPE = {
    int: ("many", 1.5, None, True, [1], {"a": 1}),
    float: ("many", None, True, [1.0], {"a": 1.0}),
    bool: ("yes", 3, None, [], {}),
    str: (3, None, True, ["a"], {"a": "b"}),
    tuple: (3, None, "text", {"a": 1}),
}
NOT_FINITE = (math.nan, math.inf, -math.inf)
TRIED = {  # values of the right type, of which a field's own range decides
    int: (-(2**70), -7, -1, 0, 2**31, 2**70),
    float: (-1e300, -1.0, 0.0, 1.0, 1e300, 2**70),
    str: ("", "no such name", "\0", "\udc80", "x" * 300),
}
LONG = "x" * 300
# What no type or range of a single field says; values that the shell may hand over.
SPECIAL = (
    ("data.temperature", 0.001), ("optim.warmup", 2**31), ("base.source", f"dir:{LONG}"), ("base.source", "dir:a\0b"),
    ("base.source", f"gguf:{LONG}"), ("base.source", "gguf:a\0b"), ("data.tasks", f"jsonl:{LONG}"),
    ("data.tasks", "jsonl:a\0b"), ("data.tasks", ","), ("data.tasks", "math,math"), ("train.init_from", LONG),
    ("train.init_from", "a\0b"), ("method.rules.up.load", (LONG,)), ("method.rules.up.load", ("a\0b",)),
    ("method.rules.up.sites", "z*"), ("method.rules.up.layers", "3-1"), ("method.rules.up.experts", "0"),
    ("method.rules.up.experts", "9" * 5000), ("method.rules.up.layers", "9" * 5000), ("method.rules.up.router.k", 5),
    ("mesh.fsdp", 3), ("schedule.s00.freeze", "a b"), ("engine", "ring"),
    ("schedule.s00.steps", 99), ("base.source", "random:huge"),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """`kind`: value, name (the field is called `value`), or text (as on the command line)."""

    path: str
    kind: str
    value: object

    def __str__(self):
        return f"{self.path} {self.kind} {self.value!r:.60}"


def fields(config):
    """`{dotted path: Field}` of everything that a config can hold, options of its members included."""
    found = {}

    def walk(prefix, group):
        for name, field in group.items():
            found[f"{prefix}{name}"] = field
            if isinstance(field, dict):
                walk(f"{prefix}{name}.", field)

    walk("", known.FIELDS)
    for rule, values in config.method.rules.items():
        at = f"method.rules.{rule}"
        found |= {at: {}, f"method.rules.{rule}.adapter": {}, **{f"{at}.{k}": f for k, f in known.RULE.items()}}
        for group, axis in (("adapter", "adapters"), ("router", "routers")):
            if group in values:
                found |= {f"{at}.{group}.{k}": f for k, f in options(axis, values[group].name).items()}
    for loss in config.losses:
        found |= {f"losses.{loss}": {}, **{f"losses.{loss}.{k}": f for k, f in options("losses", loss).items()}}
    found |= {f"optim.{k}": f for k, f in options("optim", config.optim.name).items()}
    found |= {f"schedule.s00.{k}": f for k, f in known.STAGE.items()}
    return found


def cases(config) -> list[Case]:
    found = [Case(path, "value", value) for path, value in SPECIAL]
    for path, field in fields(config).items():
        last = path.rsplit(".", 1)[-1]
        if not path.startswith("method.rules.") or path.count(".") > 2:  # a rule may have any name
            found.append(Case(path, "name", last + "z"))
            found.append(Case(path, "name", last[:-1] + "\N{CYRILLIC SMALL LETTER A}"))
        if isinstance(field, dict):
            found += [Case(path, "value", value) for value in (None, 3, "text", [], [1], [{}], True)]
            continue
        found += [Case(path, "value", value) for value in OF_ANOTHER_TYPE[field.kind]]
        if field.kind in (int, float):
            found += [Case(path, "value", value) for value in NOT_FINITE]
            found += [Case(path, "text", text) for text in ("nan", "inf", "many", "", "1e999", "0x10", "9" * 5000)]
        for value in TRIED.get(field.kind, ()):
            if isinstance(value, field.kind) and not field.accepts(value):
                found.append(Case(path, "value", value))
    return found


def check(case: Case, config) -> str:
    """ "" where the config with that mistake is refused by name."""
    last = case.path.rsplit(".", 1)[-1]
    if case.kind == "text":

        def validate():
            changed = flags.override(config, [(case.path, case.value)])
            config_lib.validate(changed)
            return f"{case}: taken as {_get(changed.to_dict(), case.path)!r}"

        return _named(case, refused(validate, last))
    tree = json.loads(json.dumps(config_lib.to_dict(config)))
    *parents, _ = case.path.split(".")
    group = tree
    for parent in parents:
        group = group[parent]
    if case.kind == "name":
        group[case.value] = group.pop(last, None)
        last = case.value
    else:
        group[last] = case.value
    wrong = refused(lambda: config_lib.validate(tree), last if last.isidentifier() else "")
    return _named(case, wrong) or _named(case, refused(lambda: config_lib.validate(config_lib.from_dict(tree)), last))


def _named(case, wrong):
    return f"{case}: {wrong}" if wrong else ""


def _get(tree, path):
    for key in path.split("."):
        tree = tree[key]
    return tree


def from_schema(seed: int, tries: int) -> list[Failure]:
    """All tries in one fresh process, which says at the end whether jax was imported."""
    CHANNEL.send(started=seed)
    base_folder()  # made here, found there: making it brings jax
    code = f"from tests.faults import configs; configs.child({seed}, {tries})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=False)
    lines = done.stdout.splitlines()
    found = [Failure(**failure) for failure in json.loads(lines[-1])] if lines else [Failure(seed, done.stderr[-300:])]
    for failure in found:
        CHANNEL.send(failed=dataclasses.asdict(failure))
    return found


def child(seed, tries):
    config = tiny_config()
    every = cases(config)

    def one(number):  # a stride that is prime to their number visits all of them
        case = every[number * 7919 % len(every)]
        try:
            wrong = check(case, config)
        except Exception as error:  # named here, so that the case is known
            return f"{case}: {type(error).__name__}: {str(error)[:200]}"
        return wrong or ("jax was imported" if "jax" in sys.modules else "")

    found = each(seed, tries, one)
    print(json.dumps([dataclasses.asdict(failure) for failure in found]))
