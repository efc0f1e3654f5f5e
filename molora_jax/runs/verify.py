"""What in a run's folder is as it was written: `verify(DIR)` for `launch.verify`. No jax, unless `deep`.

    {"workdir": DIR, "ok": bool, "newest_valid": N | null, "best": N | null,
     "steps": [{"step": N, "valid": bool, "reason": ""}, ...], "problems": [TEXT, ...], "notes": [TEXT, ...]}

A problem is something that is not what was written or that contradicts a step; a note is what a healthy folder may
have, such as the temporaries of a killed process, a row that a file lost and says so, or a parent that is gone.
"""

import dataclasses
import math
import pathlib

from molora_jax.config import defaults as config_defaults
from molora_jax.config import outside
from molora_jax.errors import InputError
from molora_jax.runs import identity, parents, saved
from molora_jax.runs import steps as steps_lib
from molora_jax.runs.folders import is_group, no_run
from molora_jax.runs.manifest import damaged_file, read_manifest
from molora_jax.runs.metrics_file import look


def verify(folder, *, deep: bool = False) -> dict:
    """Reads all of a run's files.

    Args:
      deep: also loads every leaf of every step, as a restore would.
    """
    folder = pathlib.Path(folder)
    if is_group(folder):
        raise no_run(folder)
    outside.no_code_from(folder)
    directory = folder / "checkpoints"
    steps, manifests, problems, notes = [], {}, [], []
    for step in steps_lib.list_steps(directory):
        wrong = steps_lib.problem(directory, step)
        if not wrong:
            manifests[step] = read_manifest(directory / str(step))
            wrong = _deep(directory, step, manifests[step]) if deep else ""
        if wrong and not (directory / str(step)).exists():
            continue  # a run that is writing here has just deleted it
        steps.append({"step": step, "valid": not wrong, "reason": wrong})
    valid = [s["step"] for s in steps if s["valid"]]
    best, wrong = steps_lib.read_best(directory)
    if wrong:
        problems.append(wrong)
    elif best is not None and best not in valid:
        problems.append(f"the best step, {best}, is not valid")
    newest = manifests.get(valid[-1]) if valid else None
    problems += _of_config(folder, newest)
    more, few = _of_identity(folder, manifests)
    problems, notes = problems + more, notes + few
    for step, manifest in manifests.items():
        wrong = damaged_file(folder / saved.BASE, manifest.get("base_files") or {})
        problems += [f"{saved.BASE}, which step {step} stands on: {wrong}"] * bool(wrong)
        notes += parents.changed(manifest)
    turn = (newest or {}).get("turn", 1)
    turn = turn if isinstance(turn, int) and 1 <= turn <= 10_000 else 1
    lost = _of_metrics(folder, valid[-1] if valid else None, turn)
    (notes if lost[1] else problems).extend([lost[0]] * bool(lost[0]))
    if not steps:
        notes.append("no step was saved here")
    left = [p.relative_to(folder).as_posix() for p in _temporaries(folder)]
    if left:
        notes.append("left by a killed process (the next start removes it): " + ", ".join(left[:5]))
    ok = not problems and all(s["valid"] for s in steps)
    return {
        "workdir": str(folder), "ok": ok, "newest_valid": valid[-1] if valid else None, "best": best, "steps": steps,
        "problems": problems, "notes": notes,
    }  # fmt: skip


def _deep(directory, step, manifest) -> str:
    from molora_jax.runs.checkpoints import load

    try:
        load(directory / str(step), manifest, list(manifest["tree"]))
    except InputError as error:
        return str(error)
    return ""


def _of_config(folder, manifest) -> list[str]:
    path = folder / "config.json"
    if not path.exists():
        return [f"{path} is missing"] if manifest is not None else []
    try:
        config, _ = config_defaults.completed(saved.read_object(path))
        saved.validated(config, where=path, need_base=False)
    except InputError as error:
        return [str(error)]
    _, lines = saved.believed(config, manifest)
    step = manifest["step"] if manifest else None
    return [f"{path} is not what step {step} was saved with: " + "; ".join(lines)] * bool(lines)


def _of_identity(folder, manifests) -> tuple[list[str], list[str]]:
    path, problems = folder / "identity.json", []
    try:
        recorded = identity.read(path)
        if recorded is None and manifests:
            return [], [f"{path} is missing; the steps say what the run is"]
        for manifest in manifests.values() if recorded is not None else ():
            identity.check_record(recorded, manifest, where=str(path))
    except InputError as error:
        problems.append(str(error))
    return problems, []


def _of_metrics(folder, step, every: int) -> tuple[str, bool]:
    """What `metrics.jsonl` lost, and whether that is said in the file or will be made again."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return (f"{path} is missing", False) if step else ("", True)
    try:
        lost, offset = look(path, math.inf if step is None else step, every)
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}", False
    lost = dataclasses.replace(lost, cut=0)  # what comes after the newest valid step is made again
    return (f"{path}: {lost}", lost.told and offset is not None) if str(lost) else ("", True)


def _temporaries(folder):
    found = [p for d in (folder, folder / "report", folder / "checkpoints") if d.is_dir() for p in d.glob(".*.tmp")]
    return found + [p for kind in ("saving-*", "old-*", "deleting-*") for p in (folder / "checkpoints").glob(kind)]
