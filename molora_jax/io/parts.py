"""What is written beside its place and takes it when it is complete; what killed processes left of such is swept.

ROOT/.part-HOST-PID-RANDOM      a file or a folder of a process that is at work, or was killed
"""

import contextlib
import hashlib
import os
import pathlib
import re
import secrets
import shutil
import socket
import time

from molora_jax.io import files

_STALE_SECONDS = 86_400


def temporary(folder: pathlib.Path) -> pathlib.Path:
    """A name of this process in `folder`, not there yet. What is made there has the user's usual permissions (umask),
    so that a cache can be shared; `sweep` knows from the name whose it was."""
    return folder / f".part-{_host()}-{os.getpid()}-{secrets.token_hex(6)}"


def sweep(folder: pathlib.Path) -> None:
    """Removes what killed processes left: `temporary` of this machine's at once, anything else after a day."""
    files.sweep(folder, older=_STALE_SECONDS)
    for left in folder.glob(".part-*"):
        with contextlib.suppress(OSError):
            if _abandoned(left.name) or time.time() - left.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(left) if left.is_dir() else left.unlink()


@contextlib.contextmanager
def scratch(folder: pathlib.Path):
    """A new folder in `folder`, for the time of the block."""
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    part = temporary(folder)
    part.mkdir()
    try:
        yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextlib.contextmanager
def whole_folder(target: pathlib.Path):
    """A new folder that takes the place of `target` at the end of the block; after an error nothing of it is left.

    Raises:
      OSError: `target` is a file or a folder that holds something, or the disk refuses.
    """
    with scratch(target.parent) as part:
        yield part
        os.rename(part, target)
        files.sync_folder(target.parent)


def _host() -> str:
    """Names where process numbers mean the same: containers may share a host name, but not a name space."""
    space = ""
    with contextlib.suppress(OSError):
        space = str(os.stat("/proc/self/ns/pid").st_ino)
    return hashlib.sha256(f"{socket.gethostname()} {space}".encode()).hexdigest()[:12]


def _abandoned(name) -> bool:
    match = re.fullmatch(r"\.part-([0-9a-f]{12})-(\d{1,9})-[0-9a-f]+", name)
    if match is None or match[1] != _host():
        return False
    try:
        os.kill(int(match[2]), 0)  # sends nothing
    except ProcessLookupError:
        return True
    except OSError:  # another user's process
        return False
    return False
