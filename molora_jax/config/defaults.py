"""What a config of an older version lacks: the defaults of `configs/common.py`, of a rule, of a stage, of a member.

Read from the file itself, so that there is one place of defaults.
"""

import functools
import importlib.util
import inspect

from molora_jax.config import shipped
from molora_jax.config.fields import FIELDS, REQUIRED, WHOLE
from molora_jax.config.members import is_member, loss_of, options

COMMON = shipped.folder("configs") / "common.py"
MISSING = object()
ABSENT = {"data": {"file_tasks": False}}  # what a field's absence means where today's default is another
AXES = dict(adapter="adapters", router="routers", placement="placements", init="inits", optim="optim",
            objective="objectives", regime="regimes")  # fmt: skip
LATER = ("objective.name", "regime.name")  # of sections that older configs lack: the member has a default too
NO_COPIES = {"train_base": ""}


@functools.cache
def _common():
    if not COMMON.is_file():
        return None
    spec = importlib.util.spec_from_file_location("_molora_common", COMMON)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def sections() -> dict:
    """The whole default config as a nested dict."""
    return _common().get_config().to_dict() if _common() else {}


@functools.cache
def rule_fields() -> dict:
    """Fields of a rule that may be left out."""
    parameters = inspect.signature(_common().rule).parameters.values() if _common() else ()
    return {p.name: p.default for p in parameters if p.default not in (inspect.Parameter.empty, None)}


def completed(config: dict) -> tuple[dict, list[str]]:
    """`(config, names)`: a copy with the fields that it lacks at their defaults, and the names of these fields.

    Fields that this version does not know stay: the validator names them.
    """
    config, added = {**config}, []

    def fill(where, group, defaults):
        for name, value in defaults.items():
            if name not in group:
                added.append(f"{where}{name}")
                group[name] = value

    fill("", config, {name: value for name, value in sections().items() if not isinstance(FIELDS.get(name), dict)})
    for name, fields in FIELDS.items():
        if not isinstance(fields, dict) or name not in sections():
            continue
        if name not in config:
            added.append(name)
            config[name] = sections()[name]
        elif fields and isinstance(config[name], dict):
            config[name] = {**config[name]}
            fill(f"{name}.", config[name], sections()[name] | ABSENT.get(name, {}))
    method = config.get("method")
    rules = method.get("rules") if isinstance(method, dict) else None
    if isinstance(rules, dict):
        copies = {name: {**rule} if isinstance(rule, dict) else rule for name, rule in rules.items()}
        for name, rule in copies.items():
            if isinstance(rule, dict):
                fill(f"method.rules.{name}.", rule, rule_fields())
        config["method"] = {**method, "rules": copies}
        fill("method.", config["method"], NO_COPIES)
    schedule = config.get("schedule")
    if isinstance(schedule, dict):
        config["schedule"] = {
            k: {**WHOLE, **stage} if isinstance(stage, dict) else stage for k, stage in schedule.items()
        }
    return config, added


def default_at(tree: dict, path: str):
    """The default of the field at a dotted path of a config (or identity) `tree`; MISSING where there is none."""
    head, *rest = names = path.split(".")
    try:
        if head == "method" and len(rest) == 3:
            return rule_fields().get(rest[2], MISSING)
        if head == "losses":
            return _option("losses", loss_of(rest[0], tree["losses"][rest[0]]), *rest[1:])
        *groups, option = names
        if groups and groups[-1] in AXES and path not in LATER:  # a member, wherever it stands
            group = functools.reduce(lambda node, name: node[name], groups, tree)
            return _option(AXES[groups[-1]], group["name"], option)
        if head == "schedule":
            return WHOLE.get(rest[1], MISSING) if len(rest) == 2 else MISSING
        found = sections()[head]
        for name in rest:
            found = found[name]
    except (KeyError, TypeError, IndexError):
        return MISSING
    return found


def _option(axis, name, option):
    field = options(axis, name).get(option) if is_member(axis, name) else None
    return MISSING if field is None or field.default in (REQUIRED, None) else field.default
