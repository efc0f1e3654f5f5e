"""Paths of strangers: a FIFO hangs who opens it, a device has no end."""

import errno
import os
import pathlib
import stat

_KINDS = {
    stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}  # fmt: skip


def plain(path: str | pathlib.Path) -> pathlib.Path:
    """The path, of a plain file or of a link to one.

    Raises:
      OSError: there is no such file, or it is something else; `strerror` says what.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, f"{_KINDS.get(stat.S_IFMT(mode), 'something else')}, not a plain file", str(path))
    return pathlib.Path(path)
