"""Checks of single values and of groups of fields, and what all checks share."""

import math
import os
import pathlib
import re

from molora_jax.config import fields as tables
from molora_jax.config import members as config_members
from molora_jax.config.fields import did_you_mean, one_of, shown, wrong
from molora_jax.errors import InputError

MOST = 2**31 - 1  # steps, counts and sizes are int32 on a device


def plain(config):
    return config.to_dict() if hasattr(config, "to_dict") else config


def merged(config: dict, changes: dict) -> dict:
    """A copy of nested dicts with the leaves of `changes` in their places."""
    out = {**config}
    for name, value in changes.items():
        own = out.get(name)
        out[name] = merged(own, value) if isinstance(value, dict) and isinstance(own, dict) else value
    return out


def check_names(config, where="config"):
    """Raises InputError unless every name is text without dots, which paths such as `--config.a.b` need."""
    fields = config if isinstance(config, dict) else vars(config).get("_fields", {})  # a ConfigDict sorts its names
    for name, value in fields.items():
        if not isinstance(name, str) or "." in name or not name:
            raise wrong(where, f"a field named {shown(name)}", "names that are text without dots", "Rename it.")
        if isinstance(value, dict) or hasattr(value, "to_dict"):
            check_names(value, f"{where}.{name}")


def raise_all(found):
    """One error for all: the first one's fields, the others in its text."""
    if not found:
        return
    first, others = found[0], {str(other): None for other in found[1:]}
    fix = first.fix + "".join(f"\n  and {text}" for text in others if text != str(first))
    raise InputError(first.where, got=first.got, expected=first.expected, fix=fix)


def check_value(where, value, field):
    """Problems of one value: its type, that it is finite, its range."""
    types = {float: (float, int), tuple: (tuple, list)}.get(field.kind, field.kind)
    if not isinstance(value, types) or (isinstance(value, bool) and field.kind is not bool):
        return [wrong(where, f"{shown(value)} (a {type(value).__name__})", str(field))]
    if isinstance(value, float) and not math.isfinite(value):
        return [wrong(where, value, f"a finite number {field.expected}".rstrip())]
    if field.kind is int and not -MOST <= value <= MOST:
        return [wrong(where, shown(value), f"{field}, at most {MOST:,} (32 bits)")]
    if field.kind is float and value and not 1e-37 < abs(value) < 1e37:
        return [wrong(where, shown(value), f"{field} that float32 holds")]
    if isinstance(value, str) and not value.isascii() and value.encode(errors="replace").decode() != value:
        return [wrong(where, ascii(value), "text that is valid Unicode")]  # half a surrogate: bytes that are not UTF-8
    return [] if field.accepts(value) else [wrong(where, shown(value), str(field), _near(value, field))]


def _near(value, field):
    return did_you_mean(value, re.findall(r"'(\w+)'", field.expected)) if field.kind is str else ""


def group_problems(where, values, fields, *, elsewhere=(), of=""):
    """Problems of a group: unknown keys, missing keys, wrong values. Keys `elsewhere` are checked by others."""
    dot = f"{where}." if where else ""
    for key in values:
        if key not in fields and key not in elsewhere:
            names = [*fields, *elsewhere]
            at = key if isinstance(key, str) and 0 < len(key) <= 200 else shown(key)
            yield wrong(f"{dot}{at}", "an unknown field", f"{of}{one_of(names)}", did_you_mean(key, names))
    for key, field in fields.items():
        if key not in values:
            needed = key not in tables.LATER if isinstance(field, dict) else field.default is tables.REQUIRED
            if needed:
                text = "a group of fields" if isinstance(field, dict) else str(field)
                yield wrong(f"{dot}{key}", "nothing", text, "Add it, or start from configs/common.py.")
        elif not isinstance(field, dict):
            yield from check_value(f"{dot}{key}", values[key], field)
        elif not isinstance(values[key], dict):
            yield wrong(f"{dot}{key}", shown(values[key]), "a group of fields", "See configs/common.py.")
        elif field:
            yield from group_problems(f"{dot}{key}", values[key], field)


def member_problems(where, value, axis, *, name=""):
    """Problems of `dict(name=..., options)`; `name`: of a group whose key is a name."""
    if not isinstance(value, dict):
        return [wrong(where, shown(value), "a dict of options", config_members.as_text(axis, value))]
    key, member = name, value.get("name", name or None)
    problem = config_members.member_problem(where if key and "name" not in value else f"{where}.name", axis, member)
    if problem:
        return [problem]
    of = f"an option of {member}: "
    return list(group_problems(where, value, config_members.options(axis, member), elsewhere=("name",), of=of))


def path_of(text):
    return pathlib.Path(os.path.expanduser(text))  # pathlib's own raises where there is no such user


def there(test):
    """A test of a path; one that the system refuses (too long a name, no permission) does not exist for us."""
    try:
        return test()
    except (OSError, ValueError):
        return False


def parts_of(text):
    return [part.strip() for part in text.split(",")] if isinstance(text, str) else []
