"""Runs side by side in one step: what of their configs may differ, and the folders that they are called by.

    "optim.learning_rate=1e-4,2e-4;seed=0,1"        the product of the lists: four runs

What may differ is an argument of the compiled step (seed, learning rate, loss weights) or the rows that it is given.
Everything else is compiled into it, or is there once for all runs. Nothing here imports jax.
"""

import hashlib
import itertools
import re

from molora_jax.config.fields import FIELDS, nearest, wrong
from molora_jax.config.members import members, options
from molora_jax.config.resolve import split_commas

MAY_DIFFER = r"seed|optim\.learning_rate|losses\.\w+\.weight|data\.(?!seq_len$)\w+"
REASONS = (  # of what may not, first match wins
    (r"data\.seq_len", "it is the length of every row"),
    (r"train\.(batch_size|accumulate)", "it is the shape of a batch"),
    (r"train\.(steps|epochs|stop_after|patience|\w+_every)", "all runs take their steps together"),
    (r"method\.", "it says what trains and of which shape"),
    (r"losses\.", "of a loss only its weight is an argument of the step"),
    (r"optim\.", "of the optimizer only learning_rate is an argument of the step"),
    (r"base\.", "the base is there once, for all runs"),
    (r"mesh\.|engine|expert_parallel\.", "all runs share the mesh"),
    (r"", "it is compiled into the step that the runs share"),
)


def lists(text: str, *, where: str = "--runs", check=...) -> list[tuple[str, list[str]]]:
    """`"a=1,2;b=x"` -> `[("a", ["1", "2"]), ("b", ["x"])]`; a comma inside a value is written `\\,`.

    Args:
      where: the flag, for messages. check: called with each field; `check_may_differ` if left out, None for any field.

    Raises:
      InputError: no such form, a field twice, a field in which runs may not differ.
    """
    check = check_may_differ if check is ... else check
    out, form = [], "FIELD=VALUE,VALUE;FIELD=VALUE,..."
    for part in filter(None, (part.strip() for part in text.split(";"))):
        name, equals, values = part.partition("=")
        name, values = name.strip().removeprefix("config."), list(split_commas(values))
        if not equals or not name or not values:
            raise wrong(where, repr(part), form)
        if name in dict(out):
            raise wrong(where, f"{name} twice", "each field once", "Write all its values in one list.")
        if check is not None:
            check(name)
        out.append((name, values))
    if not out:
        raise wrong(where, repr(text), form)
    return out


def check_may_differ(name: str, where: str = "--runs"):
    """Raises InputError for a field in which runs of one step may not differ, with the reason, or that is none."""
    if re.fullmatch(MAY_DIFFER, name):
        return
    reason = next(reason for pattern, reason in REASONS if re.match(pattern, name))
    accepted = ("seed", "optim.learning_rate", "losses.NAME.weight", "data.tasks")
    there, expected = _there(name), f"one of {', '.join(accepted)} or another field of data but seq_len"
    got = "a field in which runs of one step may not differ" if there else "an unknown field"
    fix = f"Start such runs one by one: {reason}." if there else _near(name, accepted)
    raise wrong(f"{where}, {name}", got, expected, fix)


def _fields(group: str) -> tuple[str, ...]:
    """Names in a group of a config; () where they are those of rules, stages or members."""
    if group == "optim":
        return ("name", *dict.fromkeys(option for member in members("optim") for option in options("optim", member)))
    own = FIELDS.get(group)
    return tuple(own) if isinstance(own, dict) else ()


def _there(name: str) -> bool:
    """Whether a config may have such a field; of what rules, stages and members have only the group is looked at."""
    group, dot, field = name.partition(".")
    if not isinstance(FIELDS.get(group), dict):
        return group in FIELDS and not dot
    return bool(dot) and (not _fields(group) or field in _fields(group))


def _near(name: str, accepted) -> str:
    """The nearest field: in the group that is named, else by the whole name or its last part."""
    group, _, field = name.rpartition(".")
    every = [*accepted, *(f"{own}.{f}" for own in FIELDS for f in _fields(own))]
    last = {path.rpartition(".")[2]: path for path in reversed(every)}
    near = nearest(field, _fields(group))
    guess = f"{group}.{near}" if near else "" if _fields(group) else nearest(name, every)
    guess = guess or last.get(nearest(field, last), "")
    return f"Did you mean {guess!r}?" if guess else ""


def product(fields: list[tuple[str, list[str]]], *, where: str = "--runs") -> dict[str, list[tuple[str, str]]]:
    """`{folder: [(field, value), ...]}` of every combination, in the order of the lists."""
    names = _short([name for name, _ in fields])
    out = {}
    for values in itertools.product(*(values for _, values in fields)):
        folder = "_".join(f"{short}={_plain(value)}" for short, value in zip(names, values, strict=True))
        if len(folder.encode()) > LONGEST_NAME:
            got = f"{len(names)} fields, which make the name of a folder {len(folder.encode())} bytes long"
            raise wrong(where, got, f"at most {LONGEST_NAME}", "Ask for fewer fields at once.")
        if folder in out:
            got = f"two values that are called {folder!r}"
            raise wrong(where, got, "values that differ, in the name of the file too", "Change one of them.")
        out[folder] = [(name, value) for (name, _), value in zip(fields, values, strict=True)]
    return out


LONGEST, LONGEST_NAME = 60, 240  # bytes of a value in a folder's name, and of that name (a file system takes 255)


def _short(names):
    """The last part of each name, with the one before it where two end alike."""
    last = [name.split(".")[-1] for name in names]
    return [".".join(name.split(".")[-1 - (last.count(end) > 1) :]) for name, end in zip(names, last, strict=True)]


def _plain(value: str) -> str:
    """A value inside a folder's name: no separator of paths or of lists, `1e-4` as `0.0001`, LONGEST bytes."""
    try:
        return str(int(value)) if re.fullmatch(r"[+-]?\d+", value) else repr(float(value))
    except ValueError:
        value = re.sub(r"(?:jsonl|parquet):(?:[^,]*/)?([^,]*?)(?:\.jsonl|\.parquet)?(?=,|$)", r"\1", value)
    plain = re.sub(r"[^\w.+-]+", "-", value).strip("-.") or "none"
    if len(plain.encode()) <= LONGEST:
        return plain
    digest = hashlib.sha256(value.encode()).hexdigest()[:8]
    return plain.encode()[: LONGEST - 9].decode(errors="ignore") + f"-{digest}"
