"""Files: strangers' paths (a FIFO hangs who opens it, a device has no end), and ours, replaced as a whole."""

import contextlib
import errno
import json
import os
import pathlib
import secrets
import stat
import time

from molora_jax.errors import InputError
from molora_jax.io import disk

_KINDS = {
    stat.S_IFDIR: "a directory", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}  # fmt: skip


def plain(path: str | pathlib.Path) -> pathlib.Path:
    """The path, of a plain file or of a link to one.

    Raises:
      OSError: there is no such file, or it is something else; `strerror` says what.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError as error:
        if not os.path.islink(path):
            raise
        raise OSError(errno.ENOENT, "a link to a file that does not exist", str(path)) from error
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, f"{_KINDS.get(stat.S_IFMT(mode), 'something else')}, not a plain file", str(path))
    return pathlib.Path(path)


def there(path: pathlib.Path) -> bool:
    """Whether anything has this name, a link to nothing too (also of its folder): reading it says what is wrong."""
    return os.path.lexists(path) or (path.parent.is_symlink() and not path.parent.exists())


def read_text(path: pathlib.Path) -> str:
    """UTF-8, perhaps after a byte order mark. Raises InputError."""
    try:
        return plain(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(str(path), got=error.strerror or str(error), expected="a readable file") from None
    except ValueError:
        raise InputError(str(path), got="bytes that are not UTF-8", expected="UTF-8 text") from None


def read_json(path: pathlib.Path) -> dict:
    """Raises InputError where the file is missing or holds no JSON object."""
    try:
        value = json.loads(plain(path).read_text(encoding="utf-8-sig"))  # some editors put a BOM in front
        if not isinstance(value, dict):
            raise ValueError("not an object")  # noqa: TRY004
    except OSError as error:
        raise InputError(str(path), got=error.strerror or str(error), expected="a readable file") from None
    except (ValueError, RecursionError) as error:
        raise InputError(str(path), got=f"no JSON object ({error})", expected="a JSON object") from None
    return value


def json_if_there(path: pathlib.Path) -> dict:
    return read_json(path) if there(path) else {}


@contextlib.contextmanager
def named(path):
    """An error of the disk inside says that it was this file: the system names a file only where it opens one."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno in disk.OF_A_DISK:
            error.filename = str(path)
        raise


def write_text(path, text: str):
    """In a folder of our own that takes its place as a whole."""
    with named(path):
        pathlib.Path(path).write_text(text, encoding="utf-8")


@contextlib.contextmanager
def replacing(path):
    """A new binary file that takes the place of `path` as a whole at the end; after an error nothing of it is left.

    Machines may write into one folder, where two of their processes can have one number: hence the random part of its
    name. Its permissions are the usual ones (umask), so that a cache can be shared.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with named(path), open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


def write_atomically(path, text: str):
    """Either the old content or the new one is there, whenever the process or the machine stops; never a temporary."""
    with replacing(path) as file:
        file.write(text.encode("utf-8"))


def sweep(folder, *, older: float = 0.0):
    """Removes the temporaries of `replacing` that a killed process left `older` seconds ago, or before."""
    for path in pathlib.Path(folder).glob(".*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime >= older:
                path.unlink()


def sync_folder(folder):
    """Makes renames inside a folder durable, where the file system can."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems know no fsync of a folder
            raise
    finally:
        os.close(handle)
