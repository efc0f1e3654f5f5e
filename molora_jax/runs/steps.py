"""The steps below `DIR/checkpoints`, read without jax: which are there, which are whole, which is the best."""

import contextlib
import json
import pathlib
import re

from molora_jax.errors import InputError
from molora_jax.runs.manifest import damaged_file, read_manifest
from molora_jax.runs.manifest_form import count


def list_steps(directory) -> list[int]:
    """All step numbers below `DIR/checkpoints`, valid or not, in ascending order."""
    directory = pathlib.Path(directory)
    if not directory.is_dir():
        return []
    names = [p.name for p in directory.iterdir() if re.fullmatch(r"0|[1-9][0-9]{0,15}", p.name) and p.is_dir()]
    return sorted(map(int, names))


def problem(directory, step: int) -> str:
    """What is wrong with a step's manifest or files; "" where both are as written. Reads all of its files."""
    folder = pathlib.Path(directory) / str(step)
    try:
        manifest = read_manifest(folder)
    except InputError as error:
        return str(error)
    if manifest["step"] != step:
        return f"its manifest is that of step {manifest['step']}"
    return damaged_file(folder, manifest["files"])


def read_best(directory) -> tuple[int | None, str]:
    """The best step (None: none was marked), and what is wrong with `best.json` ("" for nothing).

    A step's manifest, under a checksum, says whether it was the best one so far: the newest such step is the best.
    `best.json` counts alone only where the manifests are of an older version and do not say.
    """
    path = pathlib.Path(directory) / "best.json"
    told, wrong = _told(path)
    saved = {}
    for step in list_steps(directory):
        with contextlib.suppress(InputError):
            saved[step] = read_manifest(path.with_name(str(step))).get("best")
    marked = max((step for step, best in saved.items() if best is True), default=None)
    if marked is not None and told != marked:
        wrong = wrong or (f"{path} is not there" if told is None else f"{path} names step {told}")
        return marked, f"{wrong}; step {marked} was saved as the best one, and counts as it"
    if told is not None and saved.get(told) is False:
        wrong = f"{path} names step {told}, which was not the best one when it was saved"
    return told, wrong


def _told(path) -> tuple[int | None, str]:
    """What `best.json` says, and what is wrong with it."""
    try:
        step = json.loads(path.read_text(encoding="utf-8"))["step"]
    except FileNotFoundError:
        return None, ""
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return None, f"{path} cannot be read ({type(error).__name__}: {error})"
    if not count(step):
        return None, f"{path} names no step: {step!r:.80}"
    if step not in list_steps(path.parent):
        return None, f"{path} names step {step}, which is not there"
    return step, ""
