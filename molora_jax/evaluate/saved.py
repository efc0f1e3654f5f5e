"""What a run's folder says about itself, read without jax: a wrong folder is refused within a second."""

import contextlib
import json
import os
import pathlib

from molora_jax import config as config_lib
from molora_jax.config_fields import TASKS
from molora_jax.errors import InputError

FIX = "Give the --workdir of a run of launch.train."


def read_config(workdir):
    """The ConfigDict of the run's latest start.

    Raises:
      InputError: no such folder, or one without a readable `config.json`.
    """
    if not isinstance(workdir, (str, os.PathLike)):
        raise InputError("workdir", got=repr(workdir), expected="the path of a run's folder", fix=FIX)
    folder = pathlib.Path(workdir).expanduser()
    if not folder.is_dir():
        got = f"{str(workdir)!r}, {'a file' if folder.exists() else 'which does not exist'}"
        raise InputError("workdir", got=got, expected="the folder of a run", fix=FIX)
    if not (folder / "config.json").is_file():
        raise InputError(
            "workdir", got=f"{str(workdir)!r}, without config.json", expected="the folder of a run", fix=FIX
        )
    tree = read_object(folder / "config.json")
    if isinstance(tree.get("data"), dict):
        tree["data"].setdefault("file_tasks", False)  # runs of older versions
    config = config_lib.from_dict(tree)
    config_lib.validate(without_inputs(config))
    return config


def without_inputs(config, *, keep_data: bool = False):
    """A copy that names none of the files which only training needs (they may be gone): its data and its starts."""
    config = config.copy_and_resolve_references()
    with (
        config.unlocked(),
        contextlib.suppress(AttributeError, KeyError, TypeError),
    ):  # a foreign config: validated next
        config.train.init_from = ""
        for rule in config.method.rules.values():
            rule.load = ()
        if not keep_data:
            config.data.tasks = ",".join(TASKS)
            config.data.valid = ""
    return config


def read_identity(workdir, group: str, field: str) -> str | None:
    """A field of `identity.json`, as in `("base", "digest")`; None where a run has none."""
    path = pathlib.Path(workdir).expanduser() / "identity.json"
    value = read_object(path).get(group, {}) if path.is_file() else {}
    if not isinstance(value, dict):
        raise InputError(f"{path}: {group}", got=repr(value)[:80], expected="the group as launch.train wrote it")
    return value.get(field)


def read_object(path: pathlib.Path) -> dict:
    """Raises InputError where a file holds no JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(str(path), got=f"no JSON ({error})", expected="the file as launch.train wrote it") from None
    if not isinstance(value, dict):
        raise InputError(str(path), got=type(value).__name__, expected="a JSON object")
    return value


def parse_step(text):
    """`best`, `latest` or a step's number.

    Raises:
      InputError: anything else.
    """
    if isinstance(text, str) and text in ("best", "latest"):
        return text
    if isinstance(text, (str, int)) and not isinstance(text, bool):
        with contextlib.suppress(ValueError):
            return int(text)
    raise InputError("step", got=repr(text), expected="best, latest or the number of a step")
