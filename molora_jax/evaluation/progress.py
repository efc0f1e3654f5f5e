"""Where an evaluation stands: redrawn in place on a terminal, else one line when a phase is done."""

import sys
import time

from molora_jax.runs.metrics import duration


class Phases:
    """Lines go to standard error by default, so that standard output stays the table's."""

    def __init__(self, stream=None):
        self.stream = sys.stderr if stream is None else stream
        self.redraws = self.stream.isatty()
        self._name, self._total, self._done, self._began = "", 0, 0, 0.0

    def start(self, name: str, total: int):
        """`total` of what `advance` counts."""
        self._name, self._total, self._done, self._began = name, total, 0, time.monotonic()
        self._draw()

    def advance(self, n: int = 1):
        self._done += n
        self._draw()

    def end(self):
        end = "\r\x1b[K" if self.redraws else ""
        self.stream.write(f"{end}{self._name}: {duration(time.monotonic() - self._began)}\n")
        self.stream.flush()

    def note(self, text: str):
        self.stream.write(f"{text}\n")
        self.stream.flush()

    def _draw(self):
        if self.redraws:
            self.stream.write(f"\r{self._name} {self._done}/{self._total}\x1b[K")
            self.stream.flush()
