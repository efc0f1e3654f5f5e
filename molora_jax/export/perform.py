"""`perform(workdir, format, out)`: opens a run, asks the format, and renames a whole folder into its place."""

import logging
import pathlib

from molora_jax.config.fields import did_you_mean, one_of
from molora_jax.errors import InputError
from molora_jax.export import FORMATS
from molora_jax.export.base import Source
from molora_jax.runs import written
from molora_jax.runs.opened import open_run

LOG = logging.getLogger("molora_jax.export")


def perform(workdir, format: str, out, *, step="best", note=LOG.info) -> pathlib.Path:
    """Writes a run in another program's format.

    Args:
      workdir: DIR or DIR@step. format: a name of `FORMATS`. out: a folder that is not there yet, or empty.
      note: called with a line of text.

    Returns:
      The folder.

    Raises:
      InputError: no such format, a folder that is taken, a run that the format cannot hold (with the reason).

    >>> perform("runs/lora", "peft", "exported/lora")      # doctest: +SKIP
    """
    if format not in FORMATS:
        raise InputError("--format", got=repr(format)[:80], expected=one_of(FORMATS), fix=did_you_mean(format, FORMATS))
    target = written.free(out, where="--out")
    opened = open_run(workdir, step, warn=note)
    if opened.folder.absolute() == target or opened.folder.absolute() in target.parents:
        raise InputError("--out", got=f"{target}, inside the run's folder", expected="a folder of its own")
    source = Source(opened, format, target)
    full = dict(
        at=f"--out={target}", expected="a disk that takes the files",
        fix="Make room, or choose another folder; nothing was left there.",
    )  # fmt: skip
    with written.whole(target, where="--out", **full) as part:
        for line in FORMATS[format].write(source, part):
            note(line)
    quant = opened.config.base.get("quant", "none")
    if quant != "none":
        own = "with other kernels the adapters' reader has another base; --format=merged writes the run's"
        own = "its kernels are written as the values of their codes" if format == "merged" else own
        note(f"the run was trained on its base in {quant}: {own}")
    return target
