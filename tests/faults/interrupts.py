"""SIGTERM and SIGINT at every kind of moment of a run: a valid checkpoint, and the same bits after the next start."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading

from molora_jax.runs.checkpoints import Checkpoints
from molora_jax.training import loop, programs
from tests.faults.common import changed, digests, finished_run, metric_rows, scratch, start, tiny_config
from tests.faults.report import each

PLACES = ("compile", "batch", "step", "evaluation", "snapshot", "written", "manifest", "renamed", "best")
NUMBERS = (signal.SIGTERM, signal.SIGINT)


@contextlib.contextmanager
def struck(place: str, nth: int, number: int):
    """Sends the signal to this process when it comes to a place for the nth time."""
    left = [nth]

    def strike(here):
        left[0] -= here == place
        if here == place and left[0] == 0:
            os.kill(os.getpid(), number)

    reached, put_batch, valid_nll = Checkpoints.reached, loop.sharding.put_batch, loop.TrainingRun.valid_nll
    together = programs.CompiledStep.compile_together

    def checkpoint(self, point):
        strike(point)
        reached(self, point)

    def batch(*args):
        strike("batch")
        return put_batch(*args)

    def compile_together(self, *args, step):
        if place == "compile" and not self.ready:  # inside the call that comes next
            threading.Timer(0.3, os.kill, (os.getpid(), number)).start()
        strike("step")
        together(self, *args, step=step)

    def evaluate(self, *args):
        strike("evaluation")
        return valid_nll(self, *args)

    if place == "compile":
        programs._compiled_step.cache_clear()  # else the program of the run before serves this one too
    with changed(Checkpoints, reached=checkpoint), changed(loop.sharding, put_batch=batch):
        with (
            changed(programs.CompiledStep, compile_together=compile_together),
            changed(loop.TrainingRun, valid_nll=evaluate),
        ):
            yield


def in_a_run(seed, tries):
    whole = finished_run()

    def one(number):
        rng = random.Random(number)
        place, sent = PLACES[number % len(PLACES)], NUMBERS[number // len(PLACES) % 2]
        nth = 1 if place in ("evaluation", "best") else rng.randrange(1, 4)
        at = f"{sent.name} at {place} {nth}"
        with scratch() as path:
            config = tiny_config(eval_every=4)
            with struck(place, nth, sent):
                result, _ = start(config, path / "run")
            checkpoints = Checkpoints(path / "run" / "checkpoints", keep=9)
            if result.signal != sent and not (place == "compile" and result.step == 6):
                return f"{at}: the run says signal {result.signal}, step {result.step}"
            if checkpoints.newest_valid() != result.step:
                return f"{at}: it ended at step {result.step}, saved is {checkpoints.newest_valid()}"
            start(config, path / "run")
            if digests(path / "run", 6) != digests(whole, 6) or metric_rows(path / "run") != metric_rows(whole):
                return f"{at}: what went on differs from the whole run"
        return ""

    return each(seed, tries, one)


TWICE = """
import os, signal, sys, time
from tests.faults import interrupts
from tests.faults.common import start, tiny_config
first, second = (int(n) for n in sys.argv[2:])
def stubborn(*args):
    os.kill(os.getpid(), first)
    time.sleep(0.3)
    os.kill(os.getpid(), second)
    time.sleep(60)
interrupts.loop.sharding.put_batch = stubborn
start(tiny_config(), sys.argv[1])
"""


def twice(seed, tries):
    """A second signal ends a run that does not answer the first; step 0 is there already."""
    tiny_config()

    def one(number):
        first, second = NUMBERS[number % 2], NUMBERS[number // 2 % 2]
        with scratch() as path:
            command = [sys.executable, "-c", TWICE, str(path / "run"), str(int(first)), str(int(second))]
            done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
            saved = Checkpoints(path / "run" / "checkpoints", keep=9).newest_valid()
        if done.returncode != 128 + first or "ending at once" not in done.stderr or saved != 0:
            return f"status {done.returncode}, newest step {saved}: {done.stderr[-300:]}"
        return ""

    return each(seed, tries, one)
