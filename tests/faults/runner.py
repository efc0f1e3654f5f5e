"""Runs rows in worker processes, two at a time, and gathers what failed.

A worker that says nothing for longer than a try may take is killed, one that died is replaced; either is a failure of
the try it was at, and the row goes on with the next one.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import queue
import select
import shutil
import subprocess
import sys
import tempfile
import threading
import time

from tests.faults.report import Failure
from tests.faults.table import ROWS, Row

ROOT = pathlib.Path(__file__).parents[2]
SET_UP_SECONDS = 240  # imports, a first compile, a run to be damaged later


@dataclasses.dataclass
class Result:
    """A row after its tries; `failures` by seed. `processor_seconds` leave out workers that died."""

    row: Row
    tries: int
    failures: list[Failure]
    seconds: float
    processor_seconds: float = 0.0

    def as_dict(self) -> dict:
        details = [dataclasses.asdict(failure) for failure in self.failures]
        return {
            "promise": self.row.promise, "tries": self.tries, "failures": len(self.failures), "row": self.row.name,
            "seconds": round(self.seconds, 1), "processor_seconds": round(self.processor_seconds, 1),
            "details": details,
        }  # fmt: skip


def environment(folder: pathlib.Path, devices: int) -> dict:
    """As tests/conftest.py: forced CPU devices, quick compiles, a compilation cache; and caches of its own."""
    flags = [f"--xla_force_host_platform_device_count={devices}", "--xla_backend_optimization_level=0"]
    flags.append("--xla_cpu_parallel_codegen_split_count=1")
    keep = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PYTEST_CURRENT_TEST")}
    return {
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1", "TF_CPP_MIN_LOG_LEVEL": "2", **keep,
        "XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu", "MPLBACKEND": "Agg", "PYTHONPATH": str(ROOT),
        "MOLORA_CACHE": str(folder / "cache"), "MOLORA_FAULTS": str(folder),
    }  # fmt: skip


class Worker:
    """One process of `tests.faults.worker`."""

    def __init__(self, folder, devices):
        self.devices = devices
        self.log = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.worker"], cwd=ROOT, env=environment(folder, devices),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, start_new_session=True,
        )  # fmt: skip
        self._rest = b""

    def ask(self, **request):
        self.process.stdin.write((json.dumps(request) + "\n").encode())
        self.process.stdin.flush()

    def line(self, seconds) -> dict | None:
        """The next line; None at the end of the stream. Raises TimeoutError."""
        deadline = time.monotonic() + seconds
        while b"\n" not in self._rest:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.process.stdout], [], [], left)[0]:
                raise TimeoutError
            part = os.read(self.process.stdout.fileno(), 1 << 16)
            if not part:
                return None
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\n")
        return json.loads(line)

    def end(self) -> str:
        """Kills the process and its children; how it ended and the last that it said."""
        status = self.process.poll()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, 9)
        self.process.wait()
        self.log.seek(0)
        said = self.log.read().decode(errors="replace").strip().splitlines()[-3:]
        self.log.close()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()
        return f"(status {status}) {' | '.join(said)[-300:]}"


def run(rows, *, full=False, seed=0, tries=None, tell=lambda result: None, workers=2) -> list[Result]:
    """All rows, in the order of the table.

    Args:
      full: the numbers of tries of `--full`. tries: in place of the table's number.
      tell: called with each Result when its row is done.
    """
    waiting, results, lock = queue.SimpleQueue(), {}, threading.Lock()
    for row in sorted(rows, key=lambda row: (row.devices, -row.cost(full))):
        waiting.put(row)
    folder = pathlib.Path(tempfile.mkdtemp(prefix="faults-"))

    def work():
        worker = None
        try:
            while True:
                row = waiting.get_nowait()
                number = tries or (row.full if full else row.tries)
                if not number:
                    continue
                result, worker = _one_row(row, seed, number, worker, folder)
                with lock:
                    results[row.name] = result
                    tell(result)
        except queue.Empty:
            pass
        finally:
            if worker is not None:
                worker.end()

    threads = [threading.Thread(target=work) for _ in range(workers)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return [results[row.name] for row in ROWS if row.name in results]


def _one_row(row, seed, tries, worker, folder):
    """`(Result, worker)`: the worker that is left, for the next row."""
    began, failures, first, end, used = time.monotonic(), [], seed, seed + tries, 0.0
    while first < end:
        if worker is None or worker.devices != row.devices or worker.process.poll() is not None:
            if worker is not None:
                worker.end()
            worker = Worker(folder, row.devices)
        at, lost = first, ""
        worker.ask(row=row.name, seed=first, tries=end - first)
        seconds = SET_UP_SECONDS
        while True:
            try:
                line = worker.line(seconds)
            except TimeoutError:
                lost = f"no end after {seconds:.0f} s"
                break
            if line is None:
                lost = "the process died"
                break
            if "started" in line:
                at = line["started"]
                seconds = row.seconds * 2 + 5
            elif "failed" in line:
                failures.append(Failure(**line["failed"]))
            elif "broken" in line:
                failures.append(Failure(at, line["broken"]))
                break
            elif "done" in line:
                used = line["processor_seconds"]
                break
        if not lost:
            break
        how = worker.end()
        worker = None
        failures.append(Failure(at, f"{lost} {how}"))
        first = at + 1
    return Result(row, tries, failures, time.monotonic() - began, used), worker
