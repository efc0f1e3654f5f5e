"""Examples of a file that is too large to hold: sorted in pieces on disk, and read back as one sorted sequence."""

import contextlib
import dataclasses
import heapq
import marshal
import tempfile

from molora_jax.data.example import Example, in_order

PIECE = 50_000  # examples that are held at once


class Spilled:
    """`add` examples, then go through them in the order of their text as often as wanted. The files have no name: they
    are gone with this process."""

    def __init__(self, folder):
        self._folder, self._held, self._pieces, self.count = folder, [], [], 0
        self.labels: set[str] = set()  # of labelled texts

    def add(self, example: Example, *, label: bool = False):
        self._held.append(example)
        self.count += 1
        if label:
            self.labels.add(example.target)
        if len(self._held) >= PIECE:
            self._write()

    def _write(self):
        file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 - read later
        self._held.sort(key=in_order)
        for example in self._held:
            text = marshal.dumps(_plain(example))
            file.write(len(text).to_bytes(4, "little") + text)
        self._pieces.append((file, len(self._held)))
        self._held = []

    def __iter__(self):
        """In order; equal ones as they were added."""
        held = sorted(self._held, key=in_order)
        return heapq.merge(*(self._read(*piece) for piece in self._pieces), held, key=in_order)

    @staticmethod
    def _read(file, count):
        file.seek(0)
        for _ in range(count):
            yield _example(marshal.loads(file.read(int.from_bytes(file.read(4), "little"))))

    def close(self):
        for file, _ in self._pieces:
            with contextlib.suppress(OSError):
                file.close()
        self._pieces = []


_NAMES = tuple(field.name for field in dataclasses.fields(Example))


def _plain(example: Example) -> tuple:
    values = [getattr(example, name) for name in _NAMES]
    return tuple(_plain(value) if isinstance(value, Example) else value for value in values)


def _example(values: tuple) -> Example:
    own = dict(zip(_NAMES, values, strict=True))
    return Example(**own | {"rejected": own["rejected"] and _example(own["rejected"])})
