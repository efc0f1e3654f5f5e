"""Which run a folder holds: the part of its config, of its base model and of its data that its numbers depend on.

    identity.json of the folder      what the first start recorded
    manifest.json of a step          "run": the same at the time of the step, and "identity": its hash, under a checksum

A start as another run is refused. What this version knows and an older one did not record is no difference: it is
recorded at the next start, and said once. Nothing here imports jax.
"""

import json
import pathlib

from molora_jax.config import defaults as config_defaults
from molora_jax.config.members import attribute
from molora_jax.errors import InputError
from molora_jax.runs.manifest import json_hash

SECTIONS = ("method", "losses", "optim", "schedule", "seed", "objective", "regime")
TRAIN_FIELDS = ("batch_size", "accumulate", "clip", "init_from", "exact")
# data.tasks and data.valid may hold paths: the fingerprint of their content stands for them; base.source likewise.
CONTENT = {"data": ("tasks", "data_fingerprint"), "base": ("source", "base_digest")}
TOLD = ("valid", "file_tasks")  # fields of data that the fingerprint tells as well
ADDED = "added"  # lists of the fields that later versions added to an identity.json, oldest first
BASE_FACTS = ("tokenizer", "ids", "config", "day")  # of the base, beside its digest: an older identity lacks them


def identity(config: dict, extra: dict) -> dict:
    """The part of a config that says which run this is.

    Args:
      config: nested dict with the fields of `configs/common.py`.
      extra: `base_digest` and `data_fingerprint` of the content; `base` holds `tokenizer` and `ids` (digests: all of
        it, and what turns a text into ids), `config` (every number of the decoder) and `day` (that the chat template is
        pinned to); more entries are kept under `extra`.

    Mesh, engine, remat, logging, intervals, `stop_after` and evaluation are left out. `train.steps` is left out where
    nothing depends on it (`optim.decay="constant"`, and no regime that cuts the steps itself).
    """
    result = of_config(config)
    for section, (_, content) in CONTENT.items():
        result[section] |= {content.split("_")[1]: extra[content]}
    result["base"] |= {name: value for name, value in extra.get("base", {}).items() if value is not None}
    others = {key: value for key, value in extra.items() if key not in ("base_digest", "data_fingerprint", "base")}
    return json.loads(json.dumps(result | ({"extra": others} if others else {})))


def of_config(config: dict) -> dict:
    """`identity` without what only the base and the data can say."""
    result = {name: config[name] for name in SECTIONS if name in config}
    if "objective" in result:
        result["objective"] = _without_paths(result["objective"])
    if isinstance(result.get("schedule"), dict):
        result["schedule"] = {name: _stage(stage) for name, stage in result["schedule"].items()}
    for section, (source, _) in CONTENT.items():
        result[section] = {k: v for k, v in config.get(section, {}).items() if k not in (source, *TOLD)}
    train = config.get("train", {})
    result["train"] = {name: train[name] for name in TRAIN_FIELDS if name in train}
    if needs_steps(config):
        result["train"]["steps"] = train.get("steps")
    return json.loads(json.dumps(result))


def needs_steps(config: dict) -> bool:
    """Whether what a step does depends on `train.steps`: by the learning rate, or by a regime that cuts them."""
    regime = config.get("regime")
    cut = isinstance(regime, dict) and regime.get("name", "stages") != "stages"
    return cut or config.get("optim", {}).get("decay") != "constant"


def _without_paths(objective: dict) -> dict:
    """Paths of frozen models are left out: the digest of their content is in `extra`."""
    name = objective.get("name")
    paths = (attribute("objectives", name, "PATHS") or ()) if isinstance(name, str) else ()
    return {key: value for key, value in objective.items() if key not in paths}


def _stage(stage):
    own = stage.get("objective") if isinstance(stage, dict) else None
    return {**stage, "objective": _without_paths(own)} if own else stage


def differences(old: dict, new: dict) -> list[str]:
    """`["optim.learning_rate: was 0.0002, now 0.0003", ...]` in the order of the names."""
    return [_line(name, was, now) for name, was, now in _changes(old, new)]


def compare(old: dict, new: dict) -> tuple[list[str], list[str]]:
    """`(differences, names)`: what makes `new` another run than `old`, and the fields that `old` is too old to have.

    A field that `old` lacks is new where it stands at its default (the old code did the same without it) or where it
    is a fact of the base that was not recorded; a fact that `new` cannot tell is not compared.
    """
    lines, added = [], []
    old = {name: value for name, value in old.items() if name != ADDED}
    before, after = flat(old), flat(new)

    def not_told(name, other):
        """A fact of the base that the other side does not tell; a group in its place tells it."""
        return _base_fact(name) and not any(n.startswith(f"{name}.") for n in other)

    for name, was, now in _changes(old, new):
        if was is config_defaults.MISSING:
            default = config_defaults.default_at(new, name)
            if not_told(name, before) or (
                default is not config_defaults.MISSING and json.dumps(default) == json.dumps(now)
            ):
                added.append(name)
                continue
        elif now is config_defaults.MISSING:
            default = config_defaults.default_at(old, name)
            if not_told(name, after) or (
                default is not config_defaults.MISSING and json.dumps(default) == json.dumps(was)
            ):
                continue
        lines.append(_line(name, was, now))
    return lines, added


def of_step(manifest: dict) -> dict | None:
    """The identity under which a step was saved, as far as its manifest tells it (an older one: the config's part)."""
    config, run = manifest.get("config"), manifest.get("run")
    if isinstance(run, dict):
        return run
    return of_config(config) if isinstance(config, dict) else None


def check_step(manifest: dict, new: dict, *, where: str):
    """Refuses to go on from a step that another run saved.

    Args:
      manifest: of the step, read and checked. new: the identity of this start.

    Raises:
      InputError: each field in which they differ.
    """
    old = of_step(manifest)
    if old is None:
        return
    if "run" not in manifest:  # without the content of base and data
        new = without(new, [f"{section}.{content.split('_')[1]}" for section, (_, content) in CONTENT.items()])
    changed, _ = compare(old, new)
    if changed:
        raise another_run(where, changed)


def check_record(recorded: dict, manifest: dict, *, where: str):
    """Refuses an `identity.json` that is not what a step of its folder was saved under.

    Raises:
      InputError: each field in which they differ, as far as the step tells them.
    """
    if manifest.get("identity") is None or manifest["identity"] in hashes(recorded):
        return
    saved, body = of_step(manifest), without(recorded, [ADDED])
    lines = []
    if saved is not None:
        body = {name: body[name] for name in body if name in saved} if "run" not in manifest else body
        told = flat(saved)
        lines = [_line(n, was, now) for n, was, now in _changes(saved, body) if "run" in manifest or n in told]
    raise InputError(
        where,
        got="\n  ".join(["not the identity under which step " + str(manifest["step"]) + " was saved", *lines]),
        expected="what its manifest says, which is under a checksum",
        fix="Restore the file from a copy, or delete it: the steps say what the run is.",
    )


def another_run(where: str, changed: list[str]) -> InputError:
    return InputError(
        where,
        got="another run than the one that is there:\n  " + "\n  ".join(changed) + "\n",
        expected="the same values",
        fix="Undo these changes, or choose another workdir (base.digest is the content of base.source, base.tokenizer "
        "its tokenizer and chat template, base.ids the tokenizer alone, base.config the numbers of its config, "
        "data.fingerprint the content of data.tasks).",
    )


def read(path) -> dict | None:
    """The content of an `identity.json`; None where there is none.

    Raises:
      InputError: it holds no JSON object.
    """
    path = pathlib.Path(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"a {type(found).__name__}")  # noqa: TRY004
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            str(path), got=f"{error}", expected="the identity as it was written",
            fix="Restore the file from a copy, or delete it: the steps say what the run is.",
        ) from None  # fmt: skip
    return found


def extended(old: dict, new: dict, added: list[str]) -> dict:
    """`old` with these fields of `new`, and under "added" that a later version recorded them."""
    out, values = json.loads(json.dumps(old)), flat(new)
    for name in added:
        *parents, last = name.split(".")
        group = out
        for parent in parents:
            group = group.setdefault(parent, {})
        group[last] = values[name]
    if added:
        out[ADDED] = [*out.get(ADDED, []), sorted(added)]
    return out


def hashes(recorded: dict) -> list[str]:
    """The hashes under which steps may have been saved: of `identity.json` now, and before later versions added."""
    body = {name: value for name, value in recorded.items() if name != ADDED}
    found, added = [json_hash(body)], recorded.get(ADDED, [])
    for names in reversed(added if isinstance(added, list) else []):
        body = without(body, names if isinstance(names, list) else [])
        found.append(json_hash(body))
    return found


def without(tree: dict, names) -> dict:
    """A copy without the fields at these dotted paths; a group that is left empty goes too."""
    names = {name for name in names if isinstance(name, str)}

    def cut(group, prefix):
        out = {}
        for key, value in group.items():
            path = f"{prefix}{key}"
            if path in names:
                continue
            out[key] = cut(value, f"{path}.") if isinstance(value, dict) else value
            if isinstance(value, dict) and value and not out[key]:
                del out[key]
        return out

    return cut(tree, "")


def flat(value, prefix="") -> dict:
    """`{"a.b": leaf}` of nested dicts; an empty dict has no leaf."""
    if not isinstance(value, dict):
        return {prefix: value}
    return {name: leaf for key in value for name, leaf in flat(value[key], f"{prefix}.{key}".lstrip(".")).items()}


def _changes(old, new):
    old, new, absent = flat(old), flat(new), config_defaults.MISSING
    for name in sorted(old.keys() | new.keys()):
        was, now = old.get(name, absent), new.get(name, absent)
        if was is absent or now is absent or json.dumps(was) != json.dumps(now):
            yield name, was, now


def _line(name, was, now) -> str:
    def show(value):
        return "absent" if value is config_defaults.MISSING else json.dumps(value)

    why = "the learning rate depends on it, as optim.decay is not constant, or the regime cuts the run by it"
    reason = f" ({why})" if name == "train.steps" else ""
    return f"{name}: was {show(was)}, now {show(now)}{reason}"


def _base_fact(name) -> bool:
    head, _, rest = name.partition(".")
    return head == "base" and rest.split(".")[0] in BASE_FACTS
