"""The steps below `DIR/checkpoints`, read without jax: which are there, which are whole, which is the best."""

import contextlib
import json
import pathlib
import re

from molora_jax.errors import InputError
from molora_jax.io.manifest import damaged_file, read_manifest
from molora_jax.io.manifest_form import count


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
    """The step that `best.json` marks, and what is wrong with that file ("" for nothing; without it: None, "")."""
    path = pathlib.Path(directory) / "best.json"
    try:
        step = json.loads(path.read_text(encoding="utf-8"))["step"]
    except FileNotFoundError:
        return None, ""
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return None, f"{path} cannot be read ({type(error).__name__}: {error})"
    if not count(step):
        return None, f"{path} names no step: {step!r:.80}"
    if step not in list_steps(directory):
        return None, f"{path} names step {step}, which is not there"
    with contextlib.suppress(InputError):
        manifest = read_manifest(path.with_name(str(step)))
        if manifest.get("best") is False:
            return step, f"{path} names step {step}, which was not the best one when it was saved"
    return step, ""
