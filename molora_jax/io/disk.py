"""Errors of the disk: which of them pass, and how long a run waits for that."""

import errno
import time

# A disk that is full, over quota, busy or away for a moment. What is not here (no permission, a file in a folder's
# place) stays as it is until somebody changes it.
PASSING = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EIO", "EAGAIN", "EINTR", "ESTALE", "ETIMEDOUT", "EBUSY", "ENOBUFS", "ENOLCK")
    if hasattr(errno, name)
}
OF_A_DISK = PASSING | {errno.EFBIG, errno.EROFS, errno.ENXIO, errno.ENODEV, errno.EMFILE, errno.ENFILE}
WAITS = (0.5, 2.0, 5.0)  # seconds between tries: a second of a full disk ends nothing


def passing(error: OSError) -> bool:
    return error.errno in PASSING


def patiently(function):
    """`function()`, tried again where the disk's error may pass; the last error is raised."""
    for wait in WAITS:
        try:
            return function()
        except OSError as error:
            if not passing(error):
                raise
        time.sleep(wait)
    return function()
