"""`perform(config, workdir)`: opens the runs of `surgery.inputs`, asks the surgery, writes the run that comes out."""

import dataclasses
import logging
import pathlib

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from molora_jax import config as config_lib
from molora_jax.config import outside
from molora_jax.config.fields import WHOLE
from molora_jax.config.resolve import split_commas
from molora_jax.errors import InputError
from molora_jax.runs import parents as parents_lib
from molora_jax.runs import saved, written
from molora_jax.runs.opened import open_run
from molora_jax.runs.same_base import facts_of, same_base
from molora_jax.runs.view import cut, keys_of
from molora_jax.surgery import SURGERIES
from molora_jax.surgery.base import Parent, Result

LOG = logging.getLogger("molora_jax.surgery")


def perform(config, workdir, *, note=LOG.info) -> pathlib.Path:
    """Makes one run of finished ones.

    Args:
      config: with `surgery=dict(name=..., inputs=(DIR or DIR@step, ...), options)`; nothing else of it is read: the
        new run's config is what the surgery makes of the first input's.
      workdir: a folder that is not there yet, or empty. note: called with a line of text.

    Returns:
      The folder: an ordinary run, at step 0, whose manifest names its parents by digest.

    Raises:
      InputError: before anything is computed, for whatever is wrong with the inputs or the folder.

    >>> import molora_jax as mj
    >>> config = mj.load_config("average", {"surgery.inputs": ("runs/a", "runs/b")})
    >>> mj.load_run(mj.perform(config, "runs/merged")).step
    0
    """
    config_lib.validate(config, need_rules=False)
    options = config_lib.to_dict(config).get("surgery") or {}
    if not options:
        raise InputError(
            "surgery", got="nothing", expected="the name of a surgery", fix="Start from configs/lora_lego.py."
        )
    inputs = tuple(options.pop("inputs", ()))
    target = _apart(written.free(workdir), inputs)
    name = options.pop("name")
    surgery = outside.member("surgery", SURGERIES, name)(**options)
    fewest, most = surgery.PARENTS
    if not fewest <= len(inputs) <= (len(inputs) if most is None else most):
        wanted = f"{fewest} or more" if most is None else str(fewest)
        raise InputError(
            "surgery.inputs", got=f"{len(inputs)} runs", expected=f"{wanted} for {name}",
            fix="Give them by commas: --config.surgery.inputs=DIR,DIR@step.",
        )  # fmt: skip
    parents = _opened(inputs, note)
    surgery.check(parents)
    note(f"{name} of {', '.join(inputs)}")
    result = surgery.apply(parents)
    return _write(target, result, parents, {"name": name, **options, "inputs": inputs}, note)


def _apart(target: pathlib.Path, inputs) -> pathlib.Path:
    """Raises InputError where the new run would lie in one of its parents."""
    for one in inputs:
        folder = pathlib.Path(saved.split_step(one)[0]).expanduser().absolute()
        if folder == target or folder in target.parents:
            raise InputError(
                "workdir", got=f"{target}, the folder of an input, or inside it", expected="a folder of its own"
            )
    return target


def _opened(inputs, note) -> tuple[Parent, ...]:
    """The runs, all on one base, whose weights are held once."""
    out: list[Parent] = []
    for name in inputs:
        opened = open_run(name, warn=note)
        if out:
            _on_one_base(name, opened, out[0], note)
        params = out[0].opened.base.params if out else opened.base.params
        base = dataclasses.replace(opened.base, params=params)
        out.append(Parent(name, dataclasses.replace(opened, base=base)))
    return tuple(out)


def _on_one_base(name, opened, first: Parent, note):
    """`same_base` of two inputs."""

    def refuse(got, expected, fix):
        return InputError("surgery.inputs", got=f"{name}, {got}", expected=f"{expected}, as {first.name} is", fix=fix)

    def tell(line):
        note(f"{name} was {line} than {first.name}: the new run has that of {first.name}")

    theirs, ours = (facts_of(run.base, run.config) for run in (opened, first.opened))
    same_base(theirs, ours, refuse=refuse, note=tell, one_form=True)


def _write(target, result: Result, parents: tuple[Parent, ...], how: dict, note) -> pathlib.Path:
    first = parents[0].opened
    config = _settled(result.config, parents, how)
    if "start" in first.items:
        note("the objective looks back at a start that the new run does not have: its objective is lm")
        with config.unlocked():
            config.objective = ConfigDict({"name": "lm"})
    by_key = {"adapters": result.leaves, "router_state": result.state}
    items = _trees(config, first.base.config, by_key, classes=len(first.labels))
    if result.modules:
        items["modules"] = result.modules
    facts = dict(first.facts)
    prints = {parent.opened.facts["data_fingerprint"] for parent in parents}
    facts["data_fingerprint"] = prints.pop() if len(prints) == 1 else None  # of several data there is no one
    facts["surgery"] = how | {"inputs": [parent.opened.digest for parent in parents]}
    facts.pop("frozen", None)
    entries = [parents_lib.entry(p.opened.folder, p.opened.step, p.opened.digest) for p in parents]
    return written.write(
        target, config=config, items=items, facts=facts, backbone=first.base.config, base=result.base, parents=entries
    )


def _trees(config, backbone, by_key: dict, *, classes: int) -> dict:
    """`{item: tree}` of `{item: leaves by key}`, in the segments of the new config."""
    shapes, items = written.shapes_of(config, backbone, classes=classes), {}
    for item, leaves in by_key.items():
        items[item] = cut(leaves, shapes[item], where=f"surgery: {item}")
        asked = {key for path in flatten_dict(shapes[item], sep="/") for key in keys_of(path, item)}
        more = sorted(leaves.keys() - asked, key=str)
        if more:
            raise ValueError(f"leaves that the new config does not ask for: {more[:4]}")
    return items


def _settled(config, parents: tuple[Parent, ...], how: dict):
    """The config of the new run: one plain stage, the surgery that made it, the tasks of all parents."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.schedule = {"s00": WHOLE}
        config.train.init_from, config.train.stop_after = "", 0
        config.surgery = how
        for field in ("tasks", "valid"):
            every = [split_commas(parent.config.data[field]) for parent in parents]
            if all(every):
                entries = dict.fromkeys(entry for some in every for entry in some)
                config.data[field] = ",".join(entry.replace(",", "\\,") for entry in entries)
    return config
