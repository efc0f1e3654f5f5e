"""Object stores, `gs://BUCKET/NAME` and `s3://BUCKET/NAME`, by fsspec (extra `stores`).

A store has objects, each of which appears whole under its name, a listing that shows all that are there, reads of a
range, and a put that fails where an object is already (S3's if-none-match, GCS's if-generation-match=0): `create`. It
has no rename, no append, no lock and no folders. How a run lives on that: `molora_jax/runs/remote.py`. What is only
read (a base, rows, a finished run) is copied below `$MOLORA_CACHE/stores` and read there (`at_hand`); a copy is kept
up to date by the store's own tags, and what is there already is not read again.
"""

import contextlib
import errno
import fcntl
import hashlib
import importlib.util
import json
import os
import pathlib
import shutil

from molora_jax.errors import InputError, urls

PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}
TAGS = ".molora-store.json"  # in a copy: name -> [the object's tag, bytes]
_TAG_OF = ("generation", "ETag", "etag", "md5Hash")


def is_url(path) -> bool:
    """Whether a path is of an object store that is served."""
    return isinstance(path, str) and path.partition("://")[0].lower() in PACKAGES and "://" in path


def served(where: str, path):
    """The path (or text with paths in it), if the URLs in it can be served.

    Raises:
      InputError: another scheme, no bucket, or a package that is not installed.
    """
    for url in urls(path):
        scheme, _, rest = url.partition("://")
        scheme = scheme.lower()
        if scheme not in PACKAGES:
            raise InputError(
                where, got=url, expected="a path of a mounted file system, gs://BUCKET/NAME or s3://BUCKET/NAME",
                fix="Mount it, or copy it to one of these.",
            )  # fmt: skip
        bucket, _, name = rest.partition("/")
        if not bucket or not name.strip("/") or any(part in ("", ".", "..") for part in name.rstrip("/").split("/")):
            raise InputError(where, got=url, expected=f"{scheme}://BUCKET/NAME", fix="Name bucket and folder.")
        if importlib.util.find_spec("fsspec") is None or not _installed(scheme):
            raise InputError(
                where, got=f"{url}, without {PACKAGES[scheme]}", expected="the extra stores",
                fix="pip install 'molora_jax[stores]', or mount the bucket (gcsfuse, mountpoint-s3) for what is read.",
            )  # fmt: skip
    return path


def _installed(scheme) -> bool:
    if importlib.util.find_spec(PACKAGES[scheme]) is not None:
        return True
    import fsspec

    return scheme in fsspec.registry  # somebody's own, or a test's


class Unanswered(OSError):
    """What a store, or the way to it, said no with."""


class Store:
    """The objects below a URL. Names are relative, with `/` between their parts; "" is the URL itself.

    Every method raises an OSError that says what the store said: FileNotFoundError, PermissionError, else errno EIO.
    """

    def __init__(self, url: str):
        import fsspec

        scheme, _, rest = url.partition("://")
        self.url = f"{scheme.lower()}://{rest.rstrip('/')}"
        self._root = rest.rstrip("/")
        with _told(self.url):
            self._fs = fsspec.filesystem(scheme.lower(), use_listings_cache=False)

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def list(self, below: str = "") -> dict[str, tuple[str, int]]:
        """`{name: (tag, bytes)}` of every object below a name that ends a part; the tag changes with the content."""
        root = self._at(below.rstrip("/"))
        with _told(self.url):
            try:
                found = self._fs.find(root, detail=True)
            except FileNotFoundError:
                return {}
        out = {}
        for path, info in found.items():
            if path.startswith(root + "/") and info.get("type", "file") == "file" and not path.endswith("/"):
                out[path[len(self._root) + 1 :]] = _tag(info), int(info["size"])
        return dict(sorted(out.items()))

    def info(self, name: str = "") -> tuple[str, int] | None:
        """`(tag, bytes)` of an object; None where there is none."""
        with _told(self.url):
            try:
                found = self._fs.info(self._at(name))
            except FileNotFoundError:
                return None
        return (_tag(found), int(found["size"])) if found.get("type") == "file" else None

    def read(self, name: str = "", begin: int | None = None, end: int | None = None) -> bytes:
        """The object's bytes, or those from `begin` to before `end`."""
        with _told(self.url):
            return self._fs.cat_file(self._at(name), start=begin, end=end)

    def get(self, path: pathlib.Path, name: str = "") -> None:
        """Writes the object to a file that takes the place of `path` as a whole."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with _told(self.url):
                self._fs.get_file(self._at(name), str(part))
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)

    def put(self, data: bytes | pathlib.Path, name: str) -> None:
        """Makes or replaces an object, of bytes or of a file; it is there as a whole or not at all."""
        with _told(self.url):
            if isinstance(data, bytes):
                self._fs.pipe_file(self._at(name), data)
            else:
                self._fs.put_file(str(data), self._at(name))

    def create(self, data: bytes, name: str) -> bool:
        """Makes an object; False where one of that name is already: of several who try, one succeeds."""
        with _told(self.url):
            try:
                self._fs.pipe_file(self._at(name), data, mode="create")
            except FileExistsError:
                return False
            except Exception as error:
                if "PreconditionFailed" in str(error) or "ConditionalRequestConflict" in str(error):
                    return False
                raise
        return True

    def delete(self, names) -> None:
        """Removes objects, one after the other in the order given; those that are gone already are no error."""
        for name in names:
            with _told(self.url), contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(self._at(name))


@contextlib.contextmanager
def _told(url):
    """Whatever a client library raises, as an OSError of one line."""
    try:
        yield
    except (FileNotFoundError, FileExistsError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno and error.strerror:
            raise
        code = errno.EACCES if isinstance(error, PermissionError) else errno.EIO
        first = (str(error).strip() or "no message").splitlines()[0][:300]
        raise Unanswered(code, f"{type(error).__name__}: {first}", url) from error


def _tag(info) -> str:
    return str(next((info[name] for name in _TAG_OF if info.get(name)), info["size"]))


# ---- copies of what is read ------------------------------------------------------------------------------------------


def place(url: str, kind: str = "read") -> pathlib.Path:
    """Where the copy of a URL lies on this machine; its last part is the URL's."""
    cache = pathlib.Path(os.environ.get("MOLORA_CACHE") or "~/.cache/molora_jax").expanduser().absolute()
    url = url.rstrip("/")
    return cache / "stores" / kind / hashlib.sha256(url.encode()).hexdigest()[:16] / url.rpartition("/")[2]


def at_hand(path, *, where: str = "path", skip=lambda name: False):
    """The path; of a URL that of a local copy of the object, or of all objects below it, brought up to date.

    Args:
      skip: says of a relative name that it is not wanted.

    Raises:
      InputError: nothing there, or the store does not answer.
    """
    if not is_url(path):
        return path
    served(where, path)
    target = place(path)
    try:
        store = Store(path)
        with alone(target):
            return _copy(store, target, where, skip)
    except OSError as error:
        raise unreachable(where, path, error) from error


def unreachable(where: str, url: str, error: OSError) -> InputError:
    """The error for a store, or the disk of its copies, that refuses."""
    at = f" ({error.filename})" if error.filename and not is_url(str(error.filename)) else ""
    return InputError(
        where, got=f"{url}: {error.strerror or error}{at}", expected="a store that answers",
        fix="Check the name, the network, your access (AWS_* and AWS_ENDPOINT_URL, or gcloud auth application-default "
        "login) and the room below MOLORA_CACHE.",
    )  # fmt: skip


def _copy(store: Store, target, where, skip):
    whole = store.info()
    if whole is not None:
        tags = _read_tags(target.parent)
        if tags.get("") != list(whole) or not target.is_file() or target.stat().st_size != whole[1]:
            store.get(target)
            _write_tags(target.parent, {"": list(whole)})
        return target
    found = {name: at for name, at in store.list().items() if not skip(name)}
    if not found:
        raise InputError(
            where, got=f"{store.url}, which does not exist", expected="a folder or a file", fix="Check it."
        )
    mirror(store, target, found)
    return target


def mirror(store: Store, target: pathlib.Path, found: dict[str, tuple[str, int]]) -> None:
    """Makes a folder hold the objects `found` (of `Store.list`) and no other file but hidden ones and `lock`."""
    target.mkdir(parents=True, exist_ok=True)
    tags = _read_tags(target)
    for path in sorted(target.rglob("*"), reverse=True):
        name = path.relative_to(target).as_posix()
        if path.is_dir() and not path.is_symlink():
            with contextlib.suppress(OSError):
                path.rmdir()  # only where it is empty
        elif name not in found and path.name not in (TAGS, "lock"):
            path.unlink()
    for name, at in found.items():
        path = target / name
        if target.resolve() not in path.resolve().parents:
            raise InputError(store.url, got=f"an object called {name[:80]!r}", expected="names inside the folder")
        if tags.get(name) != list(at) or not path.is_file() or path.stat().st_size != at[1]:
            tags.pop(name, None)
            _write_tags(target, tags)  # a kill in between leaves no tag of a content that is not there
            try:
                store.get(path, name)
            except OSError as error:
                if error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT):
                    error.filename = str(path)  # a write knows no name
                raise
            tags[name] = list(at)
    _write_tags(target, {name: list(at) for name, at in found.items()})


def _read_tags(folder) -> dict:
    try:
        found = json.loads((folder / TAGS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write_tags(folder, tags) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{TAGS}.{os.getpid()}.tmp"
    part.write_text(json.dumps(tags), encoding="utf-8")
    os.replace(part, folder / TAGS)


def note_tags(folder: pathlib.Path, found: dict[str, tuple[str, int]]) -> None:
    """Says of files of a copy that they are what the store holds now (of `Store.list`)."""
    _write_tags(folder, _read_tags(folder) | {name: list(at) for name, at in found.items() if at is not None})


@contextlib.contextmanager
def alone(target):
    """One process of this machine copies at a time; the others find what it brought."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.parent / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def forget(url: str, kind: str) -> None:
    """Removes the copy of a URL."""
    folder = place(url, kind).parent
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.parent.rmdir()  # of the last one
