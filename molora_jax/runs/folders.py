"""Folders that are no run's, though one lies near: a group of runs, a folder of runs, a part of a run, a base."""

import contextlib
import json
import os
import pathlib

from molora_jax.errors import InputError
from molora_jax.io.files import plain

GROUP = "runs.json"  # in the folder of runs that were trained in one step: their names
SHOWN = 8  # names of runs that a message lists
FIX = "Give the --workdir of a run of launch.train."


def is_run(folder: pathlib.Path) -> bool:
    """Whether a run of launch.train (or a surgery's) lies here, by the names of its files."""
    return os.path.isfile(folder / "config.json") and os.path.isdir(folder / "checkpoints")


def is_group(folder: pathlib.Path) -> bool:
    return os.path.isfile(folder / GROUP) and not os.path.isfile(folder / "config.json")


def runs_in(folder: pathlib.Path) -> list[str]:
    """Names of the runs that lie in a folder, as its `runs.json` orders them."""
    with contextlib.suppress(OSError):
        found = sorted(one.name for one in folder.iterdir() if is_run(one))
        order: list = []
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
            order = list(json.loads(plain(folder / GROUP).read_text(encoding="utf-8"))["runs"])
        return sorted(found, key=lambda name: order.index(name) if name in order else len(order))
    return []


def no_run(folder: pathlib.Path, where: str = "workdir", *, fix: str = FIX) -> InputError:
    """The error for a folder that is there and is no run; it names the runs that were meant."""
    inside = runs_in(folder)
    if is_group(folder) or inside:
        names = ", ".join(inside[:SHOWN]) + (f" and {len(inside) - SHOWN} more" if len(inside) > SHOWN else "")
        what = "the folder of a group of runs" if is_group(folder) else "a folder of runs"
        fix = f"Give one of them, such as {folder / inside[0]}." if inside else "None of its runs is there any more."
        got = f"'{folder}', without config.json: {what} ({names or 'none is left'})"
        return InputError(where, got=got, expected="the folder of one run", fix=fix)
    got, above = f"'{folder}', without config.json", folder.absolute().parents
    if (folder / "config.json").is_file():
        got = f"'{folder}', whose config.json is a base model's"
        fix = "A base is opened by molora_jax.load_base, and trained on by base.source."
    around = next((one for one in above[:2] if is_run(one)), None)
    if around is not None:
        step = f"@{folder.name}" if folder.name.isdigit() else ""
        got, fix = f"'{folder}', a folder inside a run", f"Give the run itself: {around}{step}."
    return InputError(where, got=got, expected="the folder of a run", fix=fix)
