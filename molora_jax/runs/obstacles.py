"""What a disk does to a run, as messages: things in its way, steps not saved, traces not written."""

import contextlib
import pathlib

import jax

from molora_jax.errors import InputError
from molora_jax.io import disk


@contextlib.contextmanager
def obstacles(workdir):
    """An OSError inside the workdir (a file where a folder should be, no permission) is the user's to mend.

    So is one of the disk, wherever it comes from.
    """
    try:
        yield
    except OSError as error:
        inside = error.filename and str(error.filename).startswith(str(pathlib.Path(workdir).absolute()))
        of_a_disk = error.errno in disk.OF_A_DISK
        if not inside and not of_a_disk:
            raise
        raise InputError(
            str(error.filename or workdir), got=error.strerror or str(error),
            expected="a disk that can be written" if of_a_disk else "what launch.train wrote there, or nothing",
            fix="Make room, and start the same command again: it goes on from the last saved step." if of_a_disk else
            "Move it away, and start the same command again.",
        ) from None  # fmt: skip


def not_saved(step: int, failures) -> InputError:
    return InputError(
        f"checkpoint {step}", got=failures[-1].error if failures else "no such step on the disk any more",
        expected="a checkpoint that can be written",
        fix="Make room (or remove what stands in the way), and start the same command again: it goes on from the last "
        "saved step.",
    )  # fmt: skip


def stop_trace(done: str) -> str:
    """Ends the trace; the text to print: a trace that the disk refuses never costs the run."""
    try:
        jax.profiler.stop_trace()
    except Exception as error:  # of XLA or of the disk
        return f"no trace: {type(error).__name__}: {str(error)[:200]}"
    return done
