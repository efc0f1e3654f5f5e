"""A run's folder, opened: its config, its base, and the arrays of one step, checked against each other."""

import dataclasses
import datetime
import json
import pathlib
from typing import Any

import jax
import numpy as np

from molora_jax import config as config_lib
from molora_jax.backbones.compile import compile_model
from molora_jax.errors import InputError
from molora_jax.io.base import configured_base
from molora_jax.io.base_facts import base_facts, pinned
from molora_jax.runs import folders, identity, parents, saved
from molora_jax.runs.bases import check_bases
from molora_jax.runs.checkpoints import Checkpoints, read_manifest
from molora_jax.runs.modules import Modules, compile_modules
from molora_jax.runs.warm_start import check_finite


@dataclasses.dataclass(frozen=True)
class Opened:
    """`base` (with numpy `params`), `items`: the step's `adapters`, `router_state` and, where it has them, `modules`
    and `start` (the run as it began, for an objective that looks back); `labels`: the classes of its rows.

    `own`: the run's config as it was saved, where `config` may be another one or without its files.
    `facts`: what makes the run what it is beside its config, as `identity` takes it; `digest`: of what was read
    (`parents.py`).
    """

    config: Any
    base: Any
    model: Any
    modules: Modules
    items: dict
    labels: tuple[str, ...]
    step: int
    folder: pathlib.Path
    facts: dict = dataclasses.field(default_factory=dict)
    digest: str = ""
    own: Any = None


def open_run(workdir, step="best", *, config=None, warn) -> Opened:
    """See `evaluation.run.load_run`; the arrays are numpy."""
    workdir, step = saved.split_step(workdir, step)
    saved_config = saved.read_config(workdir, step, warn=warn)
    folder = pathlib.Path(workdir).expanduser()
    lines = [] if config is None else _overrides(saved_config, config)
    if lines:
        warn(f"not as {folder} was trained: " + "; ".join(lines))
    config = saved_config if config is None else config
    checkpoints = Checkpoints(folder / "checkpoints", keep=1, warn=warn, writer=False)
    step = _find(checkpoints, step, folder)
    manifest = read_manifest(folder / "checkpoints" / str(step))
    recorded = identity.read(folder / "identity.json")
    facts = (recorded or manifest.get("run") or {}).get("base")
    facts = facts if isinstance(facts, dict) else {}
    if facts and not {"tokenizer", "config"} <= facts.keys():
        warn(f"{folder} is of an older version: its tokenizer, template and base's config are not compared")
    known = [str(facts["digest"])] if "digest" in facts else []
    base = configured_base(config, known)
    trained_on = facts.get("digest") or base.digest
    if trained_on != base.digest:
        raise InputError(
            "base.source", got=f"{config.base.source}, with digest {base.digest[:16]}",
            expected=f"the base that {folder} was trained on ({str(trained_on)[:16]})",
            fix="Restore that model's files.",
        )  # fmt: skip
    if recorded is not None:
        identity.check_record(recorded, manifest, where=str(folder / "identity.json"))
    base, day = pinned(base, _day(facts.get("day"), folder))
    _same_base(facts, base_facts(base, day=day), config.base.source, folder)
    config_lib.check_model(config, base.config.layers, base.config.dims, base.config.ABSENT)
    model, labels = compile_model(config, base.config, tasks=named_of(manifest, "tasks") or None), labels_of(manifest)
    modules, shapes = item_shapes(config, model, base.params, classes=len(labels))
    if "modules" in manifest["tree"]:
        shapes.setdefault("modules", {})
    if "start" in manifest["tree"]:
        shapes["start"] = dict(shapes)
    stubs = jax.tree.map(lambda s: np.broadcast_to(np.zeros((), s.dtype), s.shape), shapes)  # no memory behind them
    items = checkpoints.restore(step, stubs)
    check_finite(items, where="workdir", of=f"{folder}, step {step}")
    check_bases(model.rules, items["adapters"], where="workdir", of=f"{folder}, step {step}")
    told = recorded or manifest.get("run") or {}
    facts = {
        "base_digest": base.digest, "data_fingerprint": (told.get("data") or {}).get("fingerprint"),
        "base": base_facts(base, day=day), **(told.get("extra") or {}),
    }  # fmt: skip
    digest = parents.digest_of(manifest, parents.base_digest(folder, manifest))
    return Opened(config, base, model, modules, items, labels, step, folder, facts, digest, saved_config)


def item_shapes(config, model, params: dict, *, classes: int) -> tuple[Modules, dict]:
    """The spec of the trained modules, and the shapes of `adapters`, `router_state` and (where there are) `modules`.

    Args:
      params: of the base, or their shapes. classes: of the data.
    """
    modules = compile_modules(config, params, width=model.config.width, classes=classes)
    params = jax.eval_shape(lambda: params)
    shapes = {
        "adapters": jax.eval_shape(lambda p: model.init_adapters(jax.random.key(0), p), params),
        "router_state": jax.eval_shape(model.init_router_state),
    }
    own = modules.shapes(params)
    return modules, shapes | ({"modules": own} if own else {})


def labels_of(manifest: dict) -> tuple[str, ...]:
    """The names of the classes, in the order of their numbers, as the identity of the run states them."""
    return named_of(manifest, "labels")


def named_of(manifest: dict, what: str) -> tuple[str, ...]:
    """`labels`, or `tasks` where a router or an objective tells them apart; () where the identity has none."""
    extra = (manifest.get("run") or {}).get("extra")
    names = extra.get(what) if isinstance(extra, dict) else None
    return tuple(map(str, names)) if isinstance(names, list) else ()


def _overrides(own, config) -> list[str]:
    """Where a config is of another run than the folder's; starts and data are not needed to open one."""
    old, new = (identity.of_config(config_lib.to_dict(c)) for c in (own, config))
    lines = identity.compare(old, new)[0]
    return [line for line in lines if not line.startswith(("train.", "data.")) and ".load: " not in line]


def _same_base(recorded: dict, now: dict, source: str, folder):
    """Refuses a base whose tokenizer, template or config is not the one that the run was trained with."""
    names = [name for name in identity.BASE_FACTS if name in recorded]
    changed, _ = identity.compare(
        {"base": {name: recorded[name] for name in names}},
        json.loads(json.dumps({"base": {name: now[name] for name in names if now[name] is not None}})),
    )
    if changed:
        text = any(line.startswith(("base.tokenizer", "base.ids")) for line in changed)
        what = "tokenizer or chat template" if text else "config"
        raise InputError(
            f"base.source, {what}", got=f"{source}, with another {what} than {folder} was trained with:\n  "
            + "\n  ".join(changed) + "\n",
            expected="the same values", fix="Restore that model's files.",
        )  # fmt: skip


def _day(text, folder) -> str | None:
    try:
        return text and datetime.date.fromisoformat(text).isoformat()
    except (TypeError, ValueError):
        raise InputError(
            f"{folder / 'identity.json'}: base.day", got=repr(text)[:80], expected='a day such as "2026-11-28"'
        ) from None


def _find(checkpoints, step, folder) -> int:
    if isinstance(step, int):
        if step not in checkpoints.steps():
            have = ", ".join(map(str, checkpoints.steps())) or "none"
            raise InputError("step", got=str(step), expected=f"best, latest or a saved step of {folder} ({have})")
        return step
    found = checkpoints.best() if step == "best" else None
    found = checkpoints.newest_valid() if found is None else found
    if found is None:
        raise InputError(
            "workdir", got=f"{str(folder)!r}, without a checkpoint", expected="a run with a saved step", fix=folders.FIX
        )
    return found
