"""Orbax and tensorstore speak through an error twice: once as the exception that we report in one line, once as pages.

A full disk printed 300 to 1,000 lines of their threads' tracebacks above our message. What is dropped here is only what
also reaches us as an exception: records of Orbax's own files on the logger `absl`, asyncio's of the other leaves of a
save that one leaf has failed, and the complaint of tensorstore's callbacks that come after that save's event loop is
closed.
"""

import contextlib
import logging
import os
import sys

from orbax.checkpoint.experimental.v1._src.saving import execution

_ORBAX = f"{os.sep}orbax{os.sep}checkpoint{os.sep}"


def install():
    """Once a process; later calls change nothing."""
    for name, keep in (("absl", _keep), ("asyncio", _retrieved)):
        log = logging.getLogger(name)
        if keep not in log.filters:
            log.addFilter(keep)
    if getattr(sys.unraisablehook, "molora_jax", None) is None:
        before = sys.unraisablehook

        def hook(unraisable):
            if not _late_callback(unraisable.exc_value, unraisable.exc_traceback):
                before(unraisable)

        hook.molora_jax = True
        sys.unraisablehook = hook


def _keep(record) -> bool:
    return _ORBAX not in record.pathname


def _retrieved(record) -> bool:
    text = record.getMessage()
    return "never retrieved" not in text or not any(name in text for name in (_ORBAX, "os_error_code", "tensorstore"))


def _late_callback(error, trace) -> bool:
    """`RuntimeError: Event loop is closed`, raised in asyncio with no Python caller: a C++ thread's callback."""
    while trace is not None and trace.tb_next is not None:
        if f"{os.sep}asyncio{os.sep}" not in trace.tb_frame.f_code.co_filename:
            return False
        trace = trace.tb_next
    return isinstance(error, RuntimeError) and str(error) == "Event loop is closed"


@contextlib.contextmanager
def without_peers():
    """Lets one process of several begin a save by itself: Orbax 0.12 compares the folder's name over all of them, by
    collectives, whichever processes it was told are active. `tests/stores/test_s3.py` would hang without this."""
    name = "_check_directory_consistency"
    check = getattr(execution, name, None)
    if check is None:  # another version
        yield
        return
    setattr(execution, name, lambda directory: None)
    try:
        yield
    finally:
        setattr(execution, name, check)
