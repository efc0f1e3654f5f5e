"""What a run's folder says about itself, read without jax: a wrong folder is refused within a second."""

import contextlib
import json
import os
import pathlib

from molora_jax import config as config_lib
from molora_jax import stores
from molora_jax.config import defaults as config_defaults
from molora_jax.config import outside
from molora_jax.config.data_checks import of_family
from molora_jax.config.fields import TASKS
from molora_jax.config.objectives import in_stage
from molora_jax.config.resolve import FILES, split_commas
from molora_jax.errors import InputError
from molora_jax.io.files import plain
from molora_jax.runs import identity, remote
from molora_jax.runs import steps as steps_lib
from molora_jax.runs.folders import FIX, no_run
from molora_jax.runs.manifest import read_manifest

BASE = "base"  # the folder of a run's own base, where a surgery changed it
ANY_FILE = "jsonl:" + __file__.replace(",", "\\,")  # stands for files of rows that may be gone, where nothing is read


def read_config(workdir, step="best", *, warn=None, need_base: bool = True):
    """The ConfigDict of the run: `config.json`, with what makes the run what it is as the step's manifest says it.

    The manifest is under a checksum and was written with the weights; `config.json` is a text that anything may have
    changed since. Where they differ in a field of the run's identity, the manifest's value is used and said. Fields
    that an older version did not write stand at their defaults.

    Args:
      workdir: DIR or DIR@step.
      step: whose manifest is believed: `best`, `latest` or a number. warn: called with a line of text.
      need_base: False accepts a `base.source` that is not there.

    Raises:
      InputError: no such folder, or one without a readable `config.json`; a field that this version does not know.
    """
    if not isinstance(workdir, (str, os.PathLike)):
        raise InputError("workdir", got=repr(workdir), expected="the path of a run's folder", fix=FIX)
    workdir, step = split_step(workdir, step)
    folder = pathlib.Path(workdir).expanduser()
    outside.no_code_from(folder)
    if not folder.is_dir():
        got = f"{str(workdir)!r}, {'a file' if folder.exists() else 'which does not exist'}"
        raise InputError("workdir", got=got, expected="the folder of a run", fix=FIX)
    if not (folder / "config.json").is_file():
        raise no_run(folder)
    tree = read_object(folder / "config.json")
    if "method" not in tree and ("model_type" in tree or "architectures" in tree):  # of a Hugging Face folder
        raise no_run(folder)
    tree, _ = config_defaults.completed(tree)
    tree, lines = believed(tree, manifest_of(folder, step))
    if lines and warn is not None:
        warn(f"{folder / 'config.json'} is not what the step was saved with; the step's values are used: "
             + "; ".join(lines))  # fmt: skip
    if (folder / BASE / "config.json").is_file() and isinstance(tree.get("base"), dict):
        own = f"dir:{folder.absolute() / BASE}"  # wherever the folder lies now
        tree["base"] = {**tree["base"], "source": own}
    return validated(tree, where=folder / "config.json", need_base=need_base)


def split_step(run, step="best"):
    """`(DIR, step)` of `DIR` or `DIR@step`; a folder that is there under the whole name is meant as it stands. Of a URL
    DIR is a local copy of the run, brought up to date.

    Raises:
      InputError: a step that is none.
    """
    text = os.fspath(run) if isinstance(run, (str, os.PathLike)) else ""
    folder, at, own = text.rpartition("@")
    if stores.is_url(text):
        at = at if own in ("best", "latest") or own.isdecimal() else ""
        run, folder = (remote.at_hand(folder if at else text),) * 2
    elif at and folder and pathlib.Path(text).expanduser().exists():
        at = ""
    if not at or not folder:
        return run, parse_step(step)
    if step not in ("best", parse_step(own), own):
        raise InputError("step", got=f"{step!r}, with {text}", expected="a step once", fix=f"Leave it out, or @{own}.")
    return folder, parse_step(own)


def validated(tree: dict, *, where, need_base: bool = True):
    """The ConfigDict of a run's config; `need_base=False` accepts a base that is not there.

    Raises:
      InputError: an unknown field, a wrong value.
    """
    try:
        config = config_lib.from_dict(tree)
        checked = without_inputs(config)
        if not need_base:
            checked.base.source = "random:tiny"
        if config.get("surgery"):
            checked.surgery = config_lib.from_dict({})  # it is done: whose it was need not be here any more
        config_lib.validate(checked, need_rules=not config.get("surgery"))  # a surgery may leave a base alone
    except InputError as error:
        if error.got != "an unknown field":
            raise
        raise InputError(
            error.where, got=error.got, expected=error.expected,
            fix=f"{where} is of a newer version of molora_jax, or was changed: update, or undo that. {error.fix}",
        ) from None  # fmt: skip
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:  # ConfigDict's
        raise InputError(str(where), got=f"{type(error).__name__}: {error}", expected="a config", fix=FIX) from None
    return config


def manifest_of(folder, step="best") -> dict | None:
    """The manifest of a step (a number, `best`, `latest`), else of the newest step that has a readable one."""
    directory = pathlib.Path(folder) / "checkpoints"
    marked = steps_lib.read_best(directory)[0] if step == "best" else step if isinstance(step, int) else None
    for number in [*([] if marked is None else [marked]), *reversed(steps_lib.list_steps(directory))]:
        with contextlib.suppress(InputError):
            return read_manifest(directory / str(number))
    return None


def believed(config: dict, manifest: dict | None) -> tuple[dict, list[str]]:
    """`(config, lines)`: a run's config with the identity fields of a step's manifest, and where these differ.

    Paths (`base.source`, `data.tasks`, `data.valid`) and what may change between two starts stay as in `config`.
    """
    saved = (manifest or {}).get("config")
    if not isinstance(saved, dict) or not all(isinstance(saved.get(n), dict) for n in ("train", "method", "base")):
        return config, []
    saved, _ = config_defaults.completed(saved)
    config = as_in_stage(config, saved, (manifest or {}).get("stage"))
    out = {**config}
    for section in identity.SECTIONS:
        if section in saved:
            out[section] = saved[section]
    for section, (source, _) in identity.CONTENT.items():
        if isinstance(out.get(section), dict) and isinstance(saved.get(section), dict):
            kept = {name: out[section][name] for name in (source, "valid") if name in out[section]}
            out[section] = {**out[section], **saved[section], **kept}
    names = [*identity.TRAIN_FIELDS, *(["steps"] if identity.needs_steps(saved) else [])]
    if isinstance(out.get("train"), dict):
        out["train"] = {**out["train"], **{name: saved["train"][name] for name in names if name in saved["train"]}}
    return out, identity.differences(json.loads(json.dumps(out)), json.loads(json.dumps(config)))


def as_in_stage(config: dict, saved: dict, stage) -> dict:
    """A run's config as its stage `stage` changes it, where the step's own config says that it does.

    A step holds the config that its leaves fit: the run's with `set` and `objective` of the stage.
    """
    schedule = config.get("schedule")
    changes = schedule.get(stage) if isinstance(schedule, dict) else None
    if not all(isinstance(one, dict) for one in (changes, *(schedule or {}).values())):
        return config
    if not (isinstance(changes.get("set"), dict) and changes["set"] or changes.get("objective")):
        return config
    changed = in_stage(config, stage)
    older = {**changed, "schedule": schedule}  # they did not say what the other stages train by
    near = lambda one: len(identity.differences(identity.of_config(one), identity.of_config(saved)))  # noqa: E731
    return min((config, older, changed), key=near)


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
            files = any(form in str(config.data.tasks) for form in FILES)  # whose tasks stages and routers may name
            named = [task for task in split_commas(str(config.data.tasks)) if of_family(task)]
            config.data.tasks = ",".join((*TASKS, *named, *[ANY_FILE] * files))
            config.data.valid = ""
            config.train.eval_every = 0  # on its rows; without them, and with test_share=0, there may be none
            for stage in config.schedule.values():
                stage.tasks = ""
    return config


def fingerprint(workdir, step: int) -> str | None:
    """That of the data on which a step was trained; None where nothing says it."""
    folder = remote.at_hand(workdir)
    run = (manifest_of(folder, step) or {}).get("run") or identity.read(folder / "identity.json") or {}
    return run["data"].get("fingerprint") if isinstance(run.get("data"), dict) else None


def read_object(path: pathlib.Path) -> dict:
    """Raises InputError where a file holds no JSON object."""
    try:
        value = json.loads(plain(path).read_text(encoding="utf-8"))
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
