"""What a run reports: `metrics.jsonl` (every number), TensorBoard files (scalars), one line on the screen.

A row is one optimizer step; the first is step 1. NaN and the infinities, which JSON cannot hold, are the strings "NaN",
"Infinity" and "-Infinity" (as in protobuf's JSON): they stay distinct, and `float()` and `numpy.array(column, float)`
read them.
"""

import collections
import contextlib
import json
import logging
import math
import pathlib
import sys
import time

import numpy as np

from molora_jax.io import disk
from molora_jax.runs.metrics_file import Board, Lines, Lost, cut

LOG = logging.getLogger("molora_jax.runs.metrics")


class MetricsWriter:
    """Appends rows to `WORKDIR/metrics.jsonl` and event files to `WORKDIR/tensorboard`.

    Args:
      workdir: a path or a `Workdir`.
      after_step: the restored step: later rows are cut, and TensorBoard hides its later points. None keeps all.
      every: optimizer steps from one row to the next.
      per_layer: also one TensorBoard curve a layer where a value is a list; its mean is always there.
      warn: called with a line of text for what the file lost and for errors of the disk, which never end a run.
    """

    def __init__(
        self, workdir, *, after_step: int | None = None, every: int = 1, per_layer: bool = False, warn=LOG.warning
    ):  # fmt: skip
        folder = pathlib.Path(workdir)
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.per_layer, self._closed = folder / "metrics.jsonl", per_layer, False
        try:
            self.lost = cut(self.path, math.inf if after_step is None else after_step, every)
        except OSError as error:
            if error.errno not in disk.OF_A_DISK:
                raise
            self.lost = Lost()
            warn(f"{self.path.name}: rows after the restored step could not be cut ({error.strerror})")
        if str(self.lost):
            warn(f"{self.path.name}: {self.lost}")
        self._untold = "" if self.lost.told else self.lost.missing
        self._lines = Lines(self.path, warn)
        purge = None if after_step is None else after_step + 1
        self._board = Board(folder / "tensorboard", purge_step=purge, warn=warn)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def write(self, row: dict):
        """One row: `step` (an integer) and name -> number, array, list or text. Flushed to the system at once."""
        row = {name: _plain(value) for name, value in row.items()}
        step = row["step"] = int(row["step"])
        if self._untold:
            row["lost"], self._untold = self._untold, ""
        line = json.dumps({name: _json(value) for name, value in row.items()}, allow_nan=False) + "\n"
        self._lines.add(line.encode())
        self._board.add(scalars(row, per_layer=self.per_layer), step)

    def close(self):
        if not self._closed:
            self._closed = True
            self._lines.close()
            self._board.close()


def scalars(row: dict, *, per_layer: bool = False) -> dict[str, float]:
    """Of a row's values but `step`: numbers, and of a list its mean (`per_layer`: also a number a layer); no texts."""
    points = {}
    for name, value in row.items():
        if name != "step" and not isinstance(value, str):
            numbers = np.asarray(value, np.float64)
            if numbers.size:
                with np.errstate(invalid="ignore"):  # the mean of inf and -inf
                    points[name] = float(numbers.mean())
            if per_layer and numbers.ndim == 1:
                points |= {f"{name}/layer_{layer:03d}": float(number) for layer, number in enumerate(numbers)}
    return points


def _plain(value):
    """Numbers, text, or (nested) lists of numbers, from jax and numpy values too."""
    if isinstance(value, (str, int, float)):
        return value
    array = np.asarray(value)
    return array.astype(np.float64).tolist() if array.dtype.kind not in "iub" else array.tolist()


def _json(value):
    if isinstance(value, list):
        return [_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


class Progress:
    """`step 120/200  loss 1.2345  5,120 tokens/s  0:42 left`: redrawn in place on a terminal, else a line now and then.

    Args:
      steps: the step at which the run ends.
      log_every: where the output is no terminal, a line at each multiple of this, and at the last step.
      stream: standard error by default, so that standard output stays the program's.
    """

    WINDOW = 20  # steps over which speed is averaged: the first, which compiles, soon drops out

    def __init__(self, steps: int, *, log_every: int = 10, stream=None):
        self.steps, self.log_every, self.devices = steps, max(1, log_every), 1
        self.stream = sys.stderr if stream is None else stream
        self.redraws = self.stream.isatty()
        self._seen = collections.deque(maxlen=self.WINDOW + 1)  # (time, step, tokens so far)
        self._tokens, self._drawn = 0, False

    def update(self, step: int, *, loss: float | list[float], tokens: int):
        """After each step; `tokens` are those of this step, `loss` that of the run, or of each of several runs."""
        self._tokens += tokens
        self._seen.append((time.monotonic(), step, self._tokens))
        if self.redraws or step % self.log_every == 0 or step >= self.steps:
            said = f"losses {' '.join(f'{x:.3f}' for x in loss)}" if isinstance(loss, list) else f"loss {loss:.4f}"
            self._draw(f"step {step}/{self.steps}  {said}{self._speed(step)}")

    def note(self, text: str):
        """A line of its own, which stays."""
        end = "\r\x1b[K" if self._drawn else ""
        self._write(f"{end}{text}\n")
        self._drawn = False

    def close(self):
        """Ends the line that was drawn in place."""
        if self._drawn:
            self._write("\n")
            self._drawn = False

    def _write(self, text):
        with contextlib.suppress(OSError, ValueError):  # a log on a full disk, a closed pipe: the run goes on
            self.stream.write(text)
            self.stream.flush()

    def _speed(self, step):
        (began, first, before), (now, last, after) = self._seen[0], self._seen[-1]
        if last == first or now <= began:
            return ""
        left = max(0, self.steps - step) * (now - began) / (last - first)
        rate = (after - before) / (now - began)
        each = f" ({rate / self.devices:,.0f} a device)" if self.devices > 1 else ""
        return f"  {rate:,.0f} tokens/s{each}  {duration(left)} left"

    def _draw(self, line):
        self._write(f"\r{line}\x1b[K" if self.redraws else f"{line}\n")
        self._drawn = self.redraws


def is_timing(name: str) -> bool:
    """Whether a column of `metrics.jsonl` says how long something took, or what was seen since this start of the run
    (`watch/`): it differs between two equal runs."""
    return name == "seconds" or name.startswith(("time/", "watch/"))


def duration(seconds: float) -> str:
    """`0:42`, `12:05`, `3:12:05`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
