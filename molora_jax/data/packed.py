"""The texts of a task: a list as JSON in one array of bytes, and where each of its values begins.

Made piece by piece, in memory or in files, so that a list need not fit into memory; a value is decoded when it is asked
for.
"""

import collections.abc
import hashlib
import json
import tempfile

import numpy as np

SEPARATOR = b", "  # between the values of a list, as json writes it


def pack_texts(values) -> tuple[np.ndarray, np.ndarray]:
    """`(JSON of a list as bytes, where each of its values begins)`; the last entry is behind the last one."""
    columns = Columns(None, on_disk=False)
    texts = JsonList(columns, ensure_ascii=False)
    texts.extend(list(values))
    texts.end()
    return columns.done("texts"), columns.done("texts_at")


class Texts(collections.abc.Sequence):
    """The values of a packed list, each decoded when it is asked for."""

    def __init__(self, packed: np.ndarray, at: np.ndarray):
        self._packed, self._at = packed, at

    def __len__(self):
        return len(self._at) - 1

    def __getitem__(self, index):
        index = range(len(self))[index]
        if isinstance(index, range):
            return [self[i] for i in index]
        return json.loads(self._packed[self._at[index] : self._at[index + 1] - len(SEPARATOR)].tobytes())


class Columns:
    """Arrays that grow at their ends, in memory or in files without a name."""

    def __init__(self, folder, on_disk: bool):
        self._folder, self._on_disk, self._parts, self._dtypes = folder, on_disk, {}, {}

    def add(self, name: str, values: np.ndarray):
        self._dtypes[name] = values.dtype
        if not self._on_disk:
            self._parts.setdefault(name, []).append(values)
            return
        if name not in self._parts:
            self._parts[name] = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 - mapped in `done`
        self._parts[name].write(values.tobytes())

    def done(self, name: str) -> np.ndarray:
        part = self._parts.pop(name)
        if not self._on_disk:
            return np.concatenate(part)
        part.flush()
        return np.memmap(part, self._dtypes[name], "r")


class JsonList:
    """A list of values as JSON, some after the others: its digest, and where there are columns its text and places."""

    def __init__(self, columns: Columns | None = None, **options):
        self.count, self.total, self._columns, self._at, self._options = 0, hashlib.sha256(), columns, 0, options

    def extend(self, values: list):
        parts = [json.dumps(value, **self._options).encode() for value in values]
        if parts:
            text = (SEPARATOR if self.count else b"[") + SEPARATOR.join(parts)
            begin = self._at + (len(SEPARATOR) if self.count else 1)
            steps = np.cumsum([0, *(len(part) + len(SEPARATOR) for part in parts[:-1])])
            self._write(text, begin + steps)
            self.count += len(parts)

    def end(self):
        """The digest of the whole list."""
        self._write(b"]", np.array([self._at + len(SEPARATOR)]))
        return self.total

    def _write(self, text: bytes, places: np.ndarray):
        self.total.update(text)
        self._at += len(text)
        if self._columns is not None:
            self._columns.add("texts", np.frombuffer(text, np.uint8))
            self._columns.add("texts_at", places.astype(np.int64))
