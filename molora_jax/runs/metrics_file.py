"""`metrics.jsonl` and the TensorBoard files, on a disk that may fail: a run never ends because of them.

What a file lost is said: rows cut at a resume, broken lines, steps without a row (these also in the file, as `lost` of
the next row: "11-20").
"""

import collections
import contextlib
import dataclasses
import errno
import json
import math
import os
import pathlib
import time

from molora_jax.io import disk
from molora_jax.io.files import replacing

MOST_WAITING = 100_000  # rows in memory while the disk refuses them
RETRY_SECONDS = 60.0  # between tries to open a TensorBoard file
MAX_SKIPPED = 5  # of the column `skipped`: steps in a row without a finite gradient before a run gives up


@dataclasses.dataclass(frozen=True)
class Lost:
    """`cut` rows after the step, `broken` lines, `missing` steps without a row ("11-20"), `told` in a row or not."""

    cut: int = 0
    broken: int = 0
    missing: str = ""
    told: bool = True

    def __str__(self):
        parts = [f"{self.cut} rows after the restored step cut"] * bool(self.cut)
        parts += [f"{self.broken} broken lines cut"] * bool(self.broken)
        parts += [f"no rows of steps {self.missing}"] * bool(self.missing)
        return ", ".join(parts)


def look(path, after_step: float = math.inf, every: int = 1) -> tuple[Lost, int | None]:
    """What cutting a file after a step loses, and the offset from which all is to go (None: it has to be rewritten).

    There should be a row at each `every`-th step.
    """
    cut, broken, told, seen, end, last_kept = 0, 0, set(), set(), 0, 0
    with open(path, "rb") as file:
        for line in file:
            row = _row(line) if line.endswith(b"\n") else None
            end += len(line)
            if row is None:
                broken += 1
            elif row["step"] > after_step:
                cut += 1
            else:
                seen.add(row["step"])
                told.add(row.get("lost") if isinstance(row.get("lost"), str) else "")
                last_kept += len(line)
                if last_kept != end:
                    last_kept = math.nan  # something before it goes: no cut at one place will do
    top = after_step if math.isfinite(after_step) else max(seen, default=0)
    missing = ranges(sorted(set(range(every, int(top) + 1, every)) - seen)) if top < 10**8 else ""
    offset = None if math.isnan(last_kept) else int(last_kept)
    return Lost(cut, broken, missing, not missing or missing in told), offset


def cut(path, after_step: float = math.inf, every: int = 1) -> Lost:
    """Cuts the rows after a step, and lines that are no row (a kill leaves half a line); `every` as of `look`.

    At the end of the file it is cut there; else the file is replaced as a whole. A missing file counts as empty.
    """
    path = pathlib.Path(path)
    try:
        lost, offset = look(path, after_step, every)
    except FileNotFoundError:
        top = int(after_step) if math.isfinite(after_step) else 0
        return Lost(missing=ranges(range(every, top + 1, every)), told=not top)
    if not lost.cut and not lost.broken:
        return lost
    if offset is not None:
        os.truncate(path, offset)
        return lost
    with replacing(path) as new, open(path, "rb") as old:
        for line in old:
            row = _row(line) if line.endswith(b"\n") else None
            if row is not None and row["step"] <= after_step:
                new.write(line)
    return lost


def _row(line) -> dict | None:
    try:
        row = json.loads(line)
        row["step"] = float(row["step"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return row if math.isfinite(row["step"]) else None


def read_rows(path) -> list[dict]:
    """The rows of a file, in order, those that are no row left out; "NaN", "Infinity" and "-Infinity" are floats."""
    path = pathlib.Path(path)
    rows = map(_row, path.read_bytes().splitlines() if path.is_file() else [])
    found = [{name: _number(value) for name, value in row.items()} for row in rows if row is not None]
    return [row | {"step": int(row["step"])} for row in found]


def is_finite(value) -> bool:
    """Whether a value of JSON is a number, and a finite one."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _number(value):
    if isinstance(value, list):
        return [_number(item) for item in value]
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else value


def ranges(steps) -> str:
    """`[1, 2, 3, 7]` -> `1-3,7`."""
    out: list[list[int]] = []
    for step in steps:
        if out and step == out[-1][1] + 1:
            out[-1][1] = step
        else:
            out.append([step, step])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in out)


class Lines:
    """Appends whole lines to a file; what the disk refuses waits in memory for the next line."""

    def __init__(self, path, warn):
        self.path, self.warn = pathlib.Path(path), warn
        self._waiting, self._handle, self._failing, self._dropped = collections.deque(), None, False, 0
        try:
            self._open()
        except OSError as error:
            if not disk.passing(error) and error.errno not in disk.OF_A_DISK:
                raise
            self._fail(error)

    def add(self, line: bytes):
        self._waiting.append(line)
        if len(self._waiting) > MOST_WAITING:
            self._waiting.popleft()
            self._dropped += 1
        self._flush()

    def close(self):
        """The last try; says what was not written."""
        self._flush()
        lines = len(self._waiting) + self._dropped
        if lines:
            self.warn(f"{self.path.name}: the last {lines} rows could not be written")
        if self._handle is not None:
            with contextlib.suppress(OSError):
                os.close(self._handle)
            self._handle = None
        self._waiting.clear()

    def _open(self):
        self._handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        self._end = os.fstat(self._handle).st_size

    def _flush(self):
        try:
            if self._handle is not None and os.fstat(self._handle).st_nlink == 0:
                os.close(self._handle)
                self._handle = None
                self.warn(f"{self.path.name} was removed: its rows are gone, a new one begins")
            if self._handle is None:
                self._open()
            while self._waiting:
                line = self._waiting[0]
                done = os.write(self._handle, line)
                while done < len(line):
                    written = os.write(self._handle, line[done:])
                    if not written:
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    done += written
                self._end += len(line)
                self._waiting.popleft()
        except OSError as error:
            with contextlib.suppress(OSError):  # no half line stays
                if self._handle is not None:
                    os.ftruncate(self._handle, self._end)
            self._fail(error)
            return
        if self._failing:
            self._failing = False
            self.warn(f"{self.path.name} is written again, nothing is lost" if not self._dropped else
                      f"{self.path.name} is written again; {self._dropped} rows are lost")  # fmt: skip

    def _fail(self, error):
        if not self._failing:
            self._failing = True
            self.warn(
                f"{self.path.name} cannot be written ({error.strerror}): the run goes on, its rows wait in memory"
            )


class Board:
    """TensorBoard's event file, written at once and by this thread: tensorboardX's own dies and then blocks the run."""

    def __init__(self, folder, *, purge_step: int | None, warn):
        # 0.3 s, and only the writing process needs them
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._scalar, self._writer_of, self._event, self._log = summary.scalar, EventsWriter, Event, SessionLog
        self.folder, self.warn = pathlib.Path(folder), warn
        self._writer, self._next, self._told = None, 0.0, False
        self._open(purge_step)

    def add(self, values: dict[str, float], step: int):
        if self._writer is None and time.monotonic() >= self._next:
            self._open(None)
        self._write([self._event(summary=self._scalar(name, value)) for name, value in values.items()], step)

    def close(self):
        if self._writer is not None:
            with contextlib.suppress(OSError, ValueError):
                self._writer.close()
            self._writer = None

    def _open(self, purge_step):
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._writer = self._writer_of(str(self.folder / "events"))
        except OSError as error:
            self._fail(error)
            return
        if purge_step is not None:
            start = self._event(session_log=self._log(status=self._log.START))
            self._write([self._event(file_version="brain.Event:2"), start], purge_step)

    def _write(self, events, step):
        if self._writer is None:
            return
        try:
            for event in events:
                event.step, event.wall_time = step, time.time()
                self._writer.write_event(event)
            self._writer.flush()
        except (OSError, ValueError) as error:  # ValueError: a file that an earlier error closed
            self._fail(error)

    def _fail(self, error):
        self.close()
        self._next = time.monotonic() + RETRY_SECONDS
        if not self._told:
            self._told = True
            self.warn(f"tensorboard cannot be written ({getattr(error, 'strerror', None) or error}): the run goes on")
