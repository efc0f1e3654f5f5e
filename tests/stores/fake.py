"""A store in this process with the limits of GCS: objects that appear whole, `mode="create"` as if-generation-match=0,
reads of a range, a listing of what is there; no rename, no append, no folders, no writing into an object."""

import io
import itertools
import threading

import fsspec
from fsspec.spec import AbstractFileSystem


class Refused(NotImplementedError):
    """What the store cannot do."""


class FakeGS(AbstractFileSystem):
    """`fails(operation, path)` may raise, so that a test can stop a run anywhere."""

    protocol, cachable = "gs", False
    objects: dict[str, tuple[bytes, int]] = {}
    _numbers, _lock = itertools.count(1), threading.Lock()
    calls: list[tuple[str, str]] = []
    fails = staticmethod(lambda operation, path: None)

    @classmethod
    def install(cls, monkeypatch):
        fsspec.register_implementation("gs", cls, clobber=True)
        monkeypatch.setattr(cls, "objects", {})
        monkeypatch.setattr(cls, "calls", [])
        monkeypatch.setattr(cls, "fails", staticmethod(lambda operation, path: None))
        return cls

    def _did(self, operation, path):
        path = self._strip_protocol(path)
        self.calls.append((operation, path))
        type(self).fails(operation, path)
        return path

    def _info(self, path):
        content, generation = self.objects[path]
        return dict(name=path, size=len(content), type="file", generation=str(generation))

    def find(self, path, maxdepth=None, withdirs=False, detail=False, **_):
        path = self._did("list", path)
        with self._lock:
            found = {p: self._info(p) for p in sorted(self.objects) if p == path or p.startswith(path + "/")}
        return found if detail else list(found)

    def info(self, path, **_):
        path = self._did("info", path)
        with self._lock:
            if path in self.objects:
                return self._info(path)
            if any(p.startswith(path + "/") for p in self.objects):
                return dict(name=path, size=0, type="directory")
        raise FileNotFoundError(path)

    def cat_file(self, path, start=None, end=None, **_):
        path = self._did("read", path)
        with self._lock:
            if path not in self.objects:
                raise FileNotFoundError(path)
            return self.objects[path][0][start:end]

    def get_file(self, rpath, lpath, **_):
        with open(lpath, "wb") as file:
            file.write(self.cat_file(rpath))

    def pipe_file(self, path, value, mode="overwrite", **_):
        path = self._did("put", path)
        with self._lock:
            if mode == "create" and path in self.objects:
                raise FileExistsError(path)
            self.objects[path] = bytes(value), next(self._numbers)

    def put_file(self, lpath, rpath, **_):
        with open(lpath, "rb") as file:
            self.pipe_file(rpath, file.read())

    def rm_file(self, path):
        path = self._did("delete", path)
        with self._lock:
            if path not in self.objects:
                raise FileNotFoundError(path)
            del self.objects[path]

    def _open(self, path, mode="rb", **_):
        if mode != "rb":
            raise Refused(f"open for {mode}")
        return io.BytesIO(self.cat_file(path))

    def mv(self, *_, **__):
        raise Refused("rename")

    mkdir = makedirs = rmdir = rm = touch = cp_file = mv
