"""kill -9: a training child dies at random moments and at named points, again and again on one workdir.

Each child goes on from what the last one left. After every kill the newest valid step holds the same bits as that step
of a run that was never killed, and is no older than the last one that the child reported as saved. A group of runs
(`--runs`) is killed likewise: then that is the newest step which all of its runs have. One of them saves slowly, so
that kills come between the saves of one step.
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
from molora_jax.training.group import train_together
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

# Says each step that is saved, and of which run; with a point, kills itself there at the nth time.
CHILD = """
import os, signal, sys, time
from molora_jax.runs.checkpoints import Checkpoints
from molora_jax.runs.metrics import MetricsWriter
from molora_jax.training import loop
from tests.faults import kills

workdir, point, left, steps, group = sys.argv[1], sys.argv[2], [int(sys.argv[3])], int(sys.argv[4]), int(sys.argv[5])

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
    name = os.path.relpath(self.directory.parent, workdir)
    if name == kills.SLOW:
        time.sleep(1.0)
    function(self, step, staging)
    print("saved", step, name, flush=True)

Checkpoints.reached, Checkpoints._publish = reached, publish
before(Checkpoints, "_sweep", "sweep")
before(MetricsWriter, "write", "metrics")
before(loop.TrainingRun, "valid_nll", "evaluation")
print("ready", flush=True)
kills.begin(kills.configs(steps, group), workdir)
print("done", flush=True)
"""
SLOW = "seed=1"


def configs(steps, group: int) -> dict:
    """`{folder below the workdir: config}`: of the run itself, or of a group of so many, which keep one step each."""
    out = {}
    for seed in range(group or 1):
        one = tiny_config(steps=steps, save_every=2, eval_every=6, keep=1 if group else 2)
        one.seed = seed
        out[f"seed={seed}" if group else "."] = one
    return out


def begin(made: dict, workdir):
    if "." in made:
        start(made["."], workdir)
    else:
        train_together(made, workdir, note=lambda text: None)


def never_killed(steps, group: int) -> dict[str, tuple[dict[int, dict], dict]]:
    """Of each run: digests of every saved step, and the rows of its metrics."""
    made = configs(steps, group)
    with once(f"never-killed-{steps}-{group}") as (path, there):
        if not there:
            for whole in made.values():
                whole.train.keep = steps
            begin(made, path)
    saved = {name: Checkpoints(path / name / "checkpoints", keep=1).steps() for name in made}
    return {name: ({s: digests(path / name, s) for s in saved[name]}, metric_rows(path / name)) for name in made}


class Child:
    """A run, or a group of runs, in a process of its own; `saved` is the last step that it reported of all."""

    def __init__(self, workdir, steps, group: int, point="", nth=1):
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(workdir), point or "nowhere", str(nth), str(steps), str(group)],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=os.environ,
        )  # fmt: skip
        self.each, self.rest, self.done = {name: -1 for name in configs(steps, group)}, b"", False

    saved = property(lambda self: min(self.each.values()))

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
                        _, step, name = line.decode().split()
                        self.each[name] = int(step)
        return True

    def end(self):
        self.process.kill()
        while self.listen(1):
            pass
        self.process.stdout.close()
        return self.process.wait()


def _what_is_left(run: pathlib.Path, saved: int, whole) -> str:
    newest, wrong = [], []
    for name, (steps, _) in whole.items():
        checkpoints = Checkpoints(run / name / "checkpoints", keep=2)
        there = [s for s in checkpoints.steps() if checkpoints.valid(s)[0]]
        if checkpoints.steps() and not there:
            return f"{name}: no step is valid"
        newest.append(set(there))
        wrong += [f"{name} {s}" for s in there if digests(run / name, s) != steps[s]]
    common = max(set.intersection(*newest), default=-1)
    if common < saved:
        return f"step {saved} was saved, {common} is the newest valid one"
    return f"steps {wrong} differ from those never killed" if wrong else ""


def _ended(run, steps, whole) -> bool:
    """Whether it came to the end with the bits, and the metrics, of what was never killed."""
    return all(digests(run / name, steps) == w[steps] and metric_rows(run / name) == rows
               for name, (w, rows) in whole.items())  # fmt: skip


def _chain(seed, tries, group, kill):
    """`kill(run, steps, number)` for each try on one workdir, begun anew whenever the run is complete."""
    steps = FEW if tries == 1 else STEPS
    whole = never_killed(steps, group)
    with scratch() as path:
        run, count = path / "run", 0

        def one(number):
            nonlocal run, count
            child = kill(run, steps, number)
            status = child.end()
            wrong = _what_is_left(run, child.saved, whole)
            if child.done:
                if not _ended(run, steps, whole):
                    wrong = wrong or "the run that was killed ends with other bits"
                count += 1
                run = path / f"run-{count}"
            elif status != -signal.SIGKILL:
                wrong = wrong or f"the child ended with status {status}"
            return wrong

        failures = each(seed, tries, one)
        last = Child(run, steps, group)  # to the end: the whole chain against the run never killed
        while not last.done and last.listen(1):
            pass
        last.end()

        def complete(number):
            return "" if last.done and _ended(run, steps, whole) else "the chain ends with other bits"

        return failures + each(seed + tries - 1, 1, complete)


def at_random_moments(seed, tries, group=0):
    def kill(run, steps, number):
        rng = random.Random(number)
        child, began = Child(run, steps, group), time.monotonic()
        before = child.saved
        while child.saved == before and not child.done and time.monotonic() - began < SECONDS:
            if not child.listen(0.05):
                break
        long = 2.0 if steps == STEPS else 0.2  # within what is left of the run
        child.listen(rng.random() * long if number % 4 else 0.0)
        if number % 8 == 7:  # before its first save too
            child.end()
            child = Child(run, steps, group)
            child.listen(rng.random() * 8.0)
        return child

    return _chain(seed, tries, group, kill)


def at_named_points(seed, tries, group=0):
    def kill(run, steps, number):
        nth = 1 + number // len(POINTS) % 3
        child = Child(run, steps, group, POINTS[number % len(POINTS)], nth)
        while child.listen(1) and not child.done:
            pass
        return child

    return _chain(seed, tries, group, kill)


def of_a_group(seed, tries):
    """At named points, then at random moments."""
    points = (tries + 1) // 2
    failures = at_named_points(seed, points, group=2)
    return failures + (at_random_moments(seed + points, tries - points, group=2) if tries > points else [])
