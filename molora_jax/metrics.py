"""What a run reports: `metrics.jsonl` (every number), TensorBoard files (scalars), one line on the screen.

A row is one optimizer step; the first is step 1. NaN and the infinities, which JSON cannot hold, are the strings "NaN",
"Infinity" and "-Infinity" (as in protobuf's JSON): they stay distinct, and `float()` and `numpy.array(column, float)`
read them.
"""

import collections
import json
import math
import os
import pathlib
import sys
import time

import numpy as np

from molora_jax.io.manifest import sync_folder


def truncate_metrics(path, after_step: float = math.inf) -> int:
    """Cuts the rows after a step, and lines that are no row (a kill leaves half a line). Returns how many it cut.

    The file is replaced as a whole, and only if something is to be cut. A missing file counts as empty.
    """
    path = pathlib.Path(path)
    if not path.exists():
        return 0
    temporary, cut = path.with_name(f".{path.name}.tmp"), 0
    with open(path, "rb") as old, open(temporary, "wb") as new:
        for line in old:
            keep = line.endswith(b"\n") and _step(line) <= after_step
            cut += not keep
            if keep:
                new.write(line)
        new.flush()
        os.fsync(new.fileno())
    if cut:
        os.replace(temporary, path)
        sync_folder(path.parent)
    else:
        temporary.unlink()
    return cut


def _step(line) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.nan  # no row: nan <= anything is false, so it is cut


class MetricsWriter:
    """Appends rows to `WORKDIR/metrics.jsonl` and event files to `WORKDIR/tensorboard`.

    Args:
      workdir: a path or a `Workdir`.
      after_step: the restored step: later rows are cut, and TensorBoard hides its later points. None keeps all.
      per_layer: also one TensorBoard curve a layer where a value is a list; its mean is always there.
    """

    def __init__(self, workdir, *, after_step: int | None = None, per_layer: bool = False):
        from tensorboardX import SummaryWriter  # 0.3 s, and only the writing process needs it

        folder = pathlib.Path(workdir)
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.per_layer = folder / "metrics.jsonl", per_layer
        truncate_metrics(self.path, math.inf if after_step is None else after_step)
        self._file = open(self.path, "a", encoding="utf-8")
        purge = None if after_step is None else after_step + 1
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def write(self, row: dict):
        """One row: `step` (an integer) and name -> number, array, list or text. Flushed to the system at once."""
        row = {name: _plain(value) for name, value in row.items()}
        step = row["step"] = int(row["step"])
        self._file.write(json.dumps({name: _json(value) for name, value in row.items()}, allow_nan=False) + "\n")
        self._file.flush()
        for name, value in row.items():
            if name != "step" and not isinstance(value, str):
                numbers = np.asarray(value, np.float64)
                if numbers.size:
                    with np.errstate(invalid="ignore"):  # the mean of inf and -inf
                        mean = float(numbers.mean())
                    self._board.add_scalar(name, mean, step)
                if self.per_layer and numbers.ndim == 1:
                    for layer, number in enumerate(numbers):
                        self._board.add_scalar(f"{name}/layer_{layer:03d}", float(number), step)

    def close(self):
        if not self._file.closed:
            self._file.close()
            self._board.close()


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
        self.steps, self.log_every = steps, max(1, log_every)
        self.stream = sys.stderr if stream is None else stream
        self.redraws = self.stream.isatty()
        self._seen = collections.deque(maxlen=self.WINDOW + 1)  # (time, step, tokens so far)
        self._tokens, self._drawn = 0, False

    def update(self, step: int, *, loss: float, tokens: int):
        """After each step; `tokens` are those of this step."""
        self._tokens += tokens
        self._seen.append((time.monotonic(), step, self._tokens))
        if self.redraws or step % self.log_every == 0 or step >= self.steps:
            self._draw(f"step {step}/{self.steps}  loss {loss:.4f}{self._speed(step)}")

    def note(self, text: str):
        """A line of its own, which stays."""
        end = "\r\x1b[K" if self._drawn else ""
        self.stream.write(f"{end}{text}\n")
        self.stream.flush()
        self._drawn = False

    def close(self):
        """Ends the line that was drawn in place."""
        if self._drawn:
            self.stream.write("\n")
            self.stream.flush()
            self._drawn = False

    def _speed(self, step):
        (began, first, before), (now, last, after) = self._seen[0], self._seen[-1]
        if last == first or now <= began:
            return ""
        left = max(0, self.steps - step) * (now - began) / (last - first)
        return f"  {(after - before) / (now - began):,.0f} tokens/s  {duration(left)} left"

    def _draw(self, line):
        self.stream.write(f"\r{line}\x1b[K" if self.redraws else f"{line}\n")
        self.stream.flush()
        self._drawn = self.redraws


def duration(seconds: float) -> str:
    """`0:42`, `12:05`, `3:12:05`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
