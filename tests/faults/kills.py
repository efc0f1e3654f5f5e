"""kill -9: a training child dies at random moments and at named points, again and again on one workdir.

Each child goes on from what the last one left. After every kill the newest valid step holds the same bits as that step
of a run that was never killed, and is no older than the last one that the child reported as saved.
"""

import os
import pathlib
import random
import select
import signal
import subprocess
import sys
import time

from molora_jax.runs.checkpoints import Checkpoints
from tests.faults.common import digests, metric_rows, once, scratch, start, tiny_config
from tests.faults.report import each

STEPS, FEW = 24, 8  # of the run that is killed; FEW where it is killed once
POINTS = (
    "snapshot",
    "written",
    "manifest",
    "read back",
    "renamed",
    "best",
    "deleting",
    "evaluation",
    "metrics",
    "sweep",
)
SECONDS = 240  # for a child to come to its first step

# Says each step that is saved; with a point, kills itself there at the nth time.
CHILD = """
import os, signal, sys
from molora_jax.runs.checkpoints import Checkpoints
from molora_jax.runs.metrics import MetricsWriter
from molora_jax.training import loop
from tests.faults import kills
from tests.faults.common import start

workdir, point, left = sys.argv[1], sys.argv[2], [int(sys.argv[3])]

def at(place):
    left[0] -= place == point
    if place == point and left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)

def before(owner, name, place):
    function = getattr(owner, name)
    def wrapped(*args, **kwargs):
        at(place)
        return function(*args, **kwargs)
    setattr(owner, name, wrapped)

def reached(self, place):
    at(place)

def publish(self, step, staging, function=Checkpoints._publish):
    function(self, step, staging)
    print("saved", step, flush=True)

Checkpoints.reached, Checkpoints._publish = reached, publish
before(Checkpoints, "_sweep", "sweep")
before(MetricsWriter, "write", "metrics")
before(loop.TrainingRun, "valid_nll", "evaluation")
print("ready", flush=True)
start(kills.config(int(sys.argv[4])), workdir)
print("done", flush=True)
"""


def config(steps):
    return tiny_config(steps=steps, save_every=2, eval_every=6, keep=2)


def never_killed(steps) -> tuple[dict[int, dict], list]:
    """Digests of every saved step, and the rows of its metrics."""
    with once(f"never-killed-{steps}") as (path, made):
        if not made:
            whole = config(steps)
            whole.train.keep = steps
            start(whole, path)
    steps = Checkpoints(path / "checkpoints", keep=1).steps()
    return {step: digests(path, step) for step in steps}, metric_rows(path)


class Child:
    """A run in a process of its own; `saved` is the last step that it reported."""

    def __init__(self, workdir, steps, point="", nth=1):
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(workdir), point or "nowhere", str(nth), str(steps)],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=os.environ,
        )  # fmt: skip
        self.saved, self.rest, self.done = -1, b"", False

    def listen(self, seconds) -> bool:
        """Reads for so long; False at the end of the stream."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if select.select([self.process.stdout], [], [], left)[0]:
                part = os.read(self.process.stdout.fileno(), 1 << 16)
                if not part:
                    return False
                self.rest += part
                *lines, self.rest = self.rest.split(b"\n")
                for line in lines:
                    self.done |= line == b"done"
                    if line.startswith(b"saved "):
                        self.saved = int(line.split()[1])
        return True

    def end(self):
        self.process.kill()
        while self.listen(1):
            pass
        self.process.stdout.close()
        return self.process.wait()


def _what_is_left(run: pathlib.Path, saved: int, whole) -> str:
    checkpoints = Checkpoints(run / "checkpoints", keep=2)
    if not checkpoints.steps():
        return "" if saved < 0 else f"step {saved} was saved and is gone"
    step = checkpoints.newest_valid()  # raises where none is valid
    if step < saved:
        return f"step {saved} was saved, {step} is the newest valid one"
    wrong = [s for s in checkpoints.steps() if checkpoints.valid(s)[0] and digests(run, s) != whole[s]]
    return f"steps {wrong} differ from the run never killed" if wrong else ""


def _chain(seed, tries, kill):
    """`kill(run, steps, number)` for each try on one workdir, begun anew whenever the run is complete."""
    steps = FEW if tries == 1 else STEPS
    whole, rows = never_killed(steps)
    with scratch() as path:
        run, count = path / "run", 0

        def one(number):
            nonlocal run, count
            child = kill(run, steps, number)
            status = child.end()
            wrong = _what_is_left(run, child.saved, whole)
            if child.done:
                if digests(run, steps) != whole[steps] or metric_rows(run) != rows:
                    wrong = wrong or "the run that was killed ends with other bits"
                count += 1
                run = path / f"run-{count}"
            elif status != -signal.SIGKILL:
                wrong = wrong or f"the child ended with status {status}"
            return wrong

        failures = each(seed, tries, one)
        last = Child(run, steps)  # to the end: the whole chain against the run never killed
        while not last.done and last.listen(1):
            pass
        last.end()

        def complete(number):
            return "" if last.done and digests(run, steps) == whole[steps] else "the chain ends with other bits"

        return failures + each(seed + tries - 1, 1, complete)


def at_random_moments(seed, tries):
    def kill(run, steps, number):
        rng = random.Random(number)
        child, began = Child(run, steps), time.monotonic()
        before = child.saved
        while child.saved == before and not child.done and time.monotonic() - began < SECONDS:
            if not child.listen(0.05):
                break
        long = 2.0 if steps == STEPS else 0.2  # within what is left of the run
        child.listen(rng.random() * long if number % 4 else 0.0)
        if number % 8 == 7:  # before its first save too
            child.end()
            child = Child(run, steps)
            child.listen(rng.random() * 8.0)
        return child

    return _chain(seed, tries, kill)


def at_named_points(seed, tries):
    def kill(run, steps, number):
        nth = 1 + number // len(POINTS) % 3
        child = Child(run, steps, POINTS[number % len(POINTS)], nth)
        while child.listen(1) and not child.done:
            pass
        return child

    return _chain(seed, tries, kill)
