"""Another run as a start: its adapters and router state, re-cut to this run's segments by absolute layer."""

import pathlib

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from molora_jax.adapters import ADAPTERS
from molora_jax.config import outside
from molora_jax.errors import InputError
from molora_jax.runs import identity, remote
from molora_jax.runs.bases import check_bases
from molora_jax.runs.checkpoints import Checkpoints, read_manifest
from molora_jax.runs.folders import no_run, runs_in
from molora_jax.runs.same_base import same_base
from molora_jax.runs.view import View, cut, keys_of

ITEMS = ("adapters", "router_state")


def start(
    run: str, shapes: dict, *, base: dict, rules=(), where: str = "train.init_from", note=lambda text: None
) -> dict:
    """`{item: tree}` of numpy arrays for `shapes` (`{item: nested dicts of arrays or shapes}`), from another run.

    The other run's base (with `base` and `note` as in `same_base`), the scales of `rules`, every leaf's name, shape and
    dtype are compared before a value is read, and every value is finite.

    Raises:
      InputError: no such run, one on another base or of other scales, leaves that do not fit, NaN or Inf.
    """
    folder, step, manifest = newest(run, where=where)
    check_base(run, manifest, base, where=where, note=note)
    _check_scales(run, manifest, rules, where)
    stubs = {item: unflatten_dict(_stubs(manifest, item, where), sep="/") for item in shapes}
    for item, new in shapes.items():
        cut(View(stubs[item], where=where), new, where=where, dry=True)
    values = _read(run, folder, step, manifest, tuple(shapes), where)
    found = {item: cut(View(values[item], where=where), new, where=where) for item, new in shapes.items()}
    check_bases(rules, found.get("adapters", {}), where=where, of=f"{run}, step {step}")
    return found


def _check_scales(run: str, manifest: dict, rules, where: str):
    """Raises InputError where a rule of the same name has another scale (alpha) there: leaves are stored without it."""
    theirs = ((manifest.get("config") or {}).get("method") or {}).get("rules") or {}
    for rule in rules:
        options = dict((theirs.get(rule.name) or {}).get("adapter") or {})
        if not options:
            continue
        old = outside.member("adapters", ADAPTERS, options.pop("name"))(**options)
        if not np.isclose(old.scale(), rule.adapter.scale(), rtol=1e-6):
            raise InputError(
                where, got=f"{run}, whose rule {rule.name} has the scale {old.scale():g} (alpha {old.alpha:g}, rank "
                f"{old.rank})", expected=f"that of this config, {rule.adapter.scale():g}",
                fix=f"Set method.rules.{rule.name}.adapter.alpha={old.alpha:g} and rank={old.rank}, as that run has "
                "them: its change of the base would be scaled otherwise.",
            )  # fmt: skip


def newest(run: str, *, where: str) -> tuple[pathlib.Path, int, dict]:
    """`(DIR/checkpoints, step, manifest)` of a run's newest valid step.

    Raises:
      InputError: no such run, or none of its steps is valid.
    """
    folder = remote.at_hand(run, where=where) / "checkpoints"
    step = Checkpoints(folder, keep=1, writer=False).newest_valid()
    if step is None:
        if runs_in(folder.parent):
            raise no_run(folder.parent, where)
        raise InputError(
            where, got=f"{run}, without a checkpoint", expected="the workdir of a run", fix="Check the path."
        )
    return folder, step, read_manifest(folder / str(step))


def check_base(run: str, manifest: dict, ours: dict, *, where: str, note):
    """`same_base` of a run's step (an older step says its base in identity.json)."""
    told = identity.of_step(manifest) if "run" in manifest else None
    if told is None:
        path = remote.at_hand(run, where=where) / "identity.json"
        told = identity.read(path)
        if told is not None:
            identity.check_record(told, manifest, where=str(path))
    theirs = (told or {}).get("base")

    def refuse(got, expected, fix):
        return InputError(where, got=f"{run}, {got}", expected=expected, fix=fix)

    if isinstance(theirs, dict):
        same_base(theirs, ours, refuse=refuse, note=lambda text: note(f"{where}: {run} was {text}"))


def load(run: str, items=ITEMS, *, where: str = "train.init_from") -> dict:
    """These items of a run's newest valid step, each a nested dict of numpy arrays, every value finite.

    Raises:
      InputError: no such run, none of its steps is valid, or a leaf holds NaN or Inf.
    """
    return _read(run, *newest(run, where=where), items, where)


def _read(run: str, folder, step: int, manifest: dict, items, where: str) -> dict:
    template = {item: unflatten_dict(_stubs(manifest, item, where), sep="/") for item in items}
    found = Checkpoints(folder, keep=1, writer=False).restore(step, template)
    check_finite(found, where=where, of=f"{run}, step {step}")
    return found


def check_finite(items: dict, *, where: str, of: str):
    """Raises InputError that names the first leaf with NaN or Inf; `items` are nested dicts of numpy arrays."""
    for path, leaf in flatten_dict(items, sep="/").items():
        if not np.isfinite(np.asarray(leaf, np.float64 if leaf.dtype.itemsize > 4 else np.float32)).all():
            raise InputError(
                where, got=f"NaN or Inf in {path} of {of}", expected="finite numbers",
                fix="Choose another run, or an older step: this one has diverged.",
            )  # fmt: skip


def modules(run: str, new: dict, *, where: str = "train.init_from", note=lambda text: None) -> dict:
    """`new` (a fresh collection `modules`, numpy) with the leaves of another run in their places.

    A head that the other run lacks, or has for other classes, stays as it is, and `note` is told.

    Raises:
      InputError: the other run trained base leaves that this one does not train: what it learned would be lost.
    """
    folder, step, manifest = newest(run, where=where)
    old = _read(run, folder, step, manifest, ("modules",), where)["modules"] if "modules" in manifest["tree"] else {}
    old = flatten_dict(old, sep="/")
    out = flatten_dict(new, sep="/")
    lost = sorted(path.removeprefix("base/") for path in old.keys() - out.keys() if path.startswith("base/"))
    if lost:
        raise InputError(
            where, got=f"{run}, which trained the base's {', '.join(lost[:4])}", expected="copies of them here as well",
            fix="Set method.train_base as that run has it.",
        )  # fmt: skip
    for path, leaf in out.items():
        if path in old and old[path].shape == leaf.shape:
            out[path] = old[path]
        elif not path.startswith("base/"):
            note(f"modules/{path} starts anew: {run} has none of this shape")
    return unflatten_dict(out, sep="/")


def carried(old: dict, new: dict) -> tuple[dict, list[str]]:
    """`(tree, anew)`: `new` with `old`'s values, layer by layer, where they still fit, and the leaves where none does.

    Both are nested dicts of numpy arrays of one run, before and after its rules changed.
    """
    rows, out, anew = View(old, where="a stage"), {}, []
    for path, leaf in flatten_dict(new, sep="/").items():
        fits, out[path] = False, np.array(leaf)
        for i, key in enumerate(keys_of(path, "a stage")):
            place = ... if key.layer is None else i
            row = rows.get(key)
            if row is not None and (row.shape, row.dtype) == (out[path][place].shape, leaf.dtype):
                out[path][place], fits = row, True
        if not fits:
            anew.append(path)
    return unflatten_dict(out, sep="/"), anew


def load_adapters(run: str, *, where: str = "train.init_from") -> dict:
    """`load` of the adapters alone."""
    return load(run, ("adapters",), where=where)["adapters"]


def _stubs(manifest, item, where) -> dict:
    """`{name: array of the saved shape and dtype}`, without memory behind it."""
    leaves = manifest["tree"].get(item)
    if leaves is None:
        raise InputError(where, got=f"a step without {item}", expected="the checkpoint of a run of launch.train")
    return {name: np.broadcast_to(np.zeros((), np.dtype(v["dtype"])), v["shape"]) for name, v in leaves.items()}
