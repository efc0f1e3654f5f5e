"""A reader that goes away, as in `molora --help | head`: the command ends without a word."""

import os
import select
import signal
import sys

GONE = 128 + getattr(signal, "SIGPIPE", 13)  # what a shell says of a program that this signal ended


def quietly(function) -> int | None:
    """`function()`, its status; GONE where nobody reads what it prints any more. A broken pipe of its own goes on."""
    try:
        try:
            return function()
        finally:
            _flush()  # here, not at Python's exit, where nobody catches it
    except BrokenPipeError:
        if not _silenced():
            raise
        return GONE


def _flush():
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        raise
    except (OSError, ValueError):  # a full disk, a stream that is closed: Python says so at its exit
        pass


def _silenced() -> bool:
    """Whether stdout or stderr has no reader; what Python still holds for it goes nowhere."""
    found = False
    for stream in (sys.stdout, sys.stderr):
        try:
            number = stream.fileno()
        except (AttributeError, OSError, ValueError):  # none, or not a file of the system
            continue
        watch = select.poll()
        watch.register(number, select.POLLOUT)
        if any(events & (select.POLLERR | select.POLLHUP) for _, events in watch.poll(0)):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)
            os.close(nowhere)
            found = True
    return found
