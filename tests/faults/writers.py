"""Two processes on one workdir or one cache."""

import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import threading

from molora_jax.errors import InputError
from molora_jax.io.base import load_base
from molora_jax.runs.workdir import Workdir
from tests.faults.common import arrays_digest, changed, scratch
from tests.faults.report import each, misnamed
from tests.io import tiny_files

HOLDER = """
import sys, time
from molora_jax.runs.workdir import Workdir
place = Workdir(sys.argv[1])
print("held", flush=True)
time.sleep(100)
"""


def lock(seed, tries):
    """Of several writers that start at once one gets the workdir; the others are told who has it."""

    def one(number):
        with scratch() as path:
            held, errors, gate = [], [], threading.Barrier(6)

            def take():
                gate.wait()
                try:
                    held.append(Workdir(path / "run"))
                except InputError as error:
                    errors.append(error)

            threads = [threading.Thread(target=take) for _ in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            wrong = [misnamed(error, "in use by") for error in errors]
            for place in held:
                place.close()
            if len(held) != 1 or any(wrong):
                return f"{len(held)} writers at once; {wrong}"
            Workdir(path / "run").close()  # free again
        return ""

    return each(seed, tries, one)


def killed(seed, tries):
    """The workdir of a killed writer is free at once; that of a living one is not."""

    def one(number):
        with scratch() as path:
            run = path / "run"
            child = subprocess.Popen([sys.executable, "-c", HOLDER, str(run)], stdout=subprocess.PIPE, text=True)
            try:
                child.stdout.readline()
                try:
                    Workdir(run)
                    return "two writers"
                except InputError as error:
                    if misnamed(error, f"process {child.pid}"):
                        return misnamed(error, f"process {child.pid}")
                child.send_signal(random.Random(number).choice((signal.SIGKILL, signal.SIGTERM)))
                child.wait(20)
                Workdir(run).close()
            finally:
                child.kill()
                child.stdout.close()
        return ""

    return each(seed, tries, one)


def cache(seed, tries):
    """Several starts that convert the same base at once: all have the same one, and nothing is left behind."""

    def one(number):
        with scratch() as path, changed(os.environ, MOLORA_CACHE=str(path / "cache")):
            file = path / "model.gguf"
            file.write_bytes(tiny_files.llama_gguf(seed=number)[0])
            (path / "cache" / "converted" / ".part-killed").mkdir(parents=True)
            os.utime(path / "cache" / "converted" / ".part-killed", (0, 0))
            found, gate = [], threading.Barrier(4)

            def load():
                gate.wait()
                try:
                    base = load_base(f"gguf:{file}")
                    found.append(f"{base.digest} {_digest(base)}")
                except Exception as error:  # noqa: BLE001 - reported below
                    found.append(repr(error))

            threads = [threading.Thread(target=load) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            left = [p.name for p in pathlib.Path(path / "cache" / "converted").glob(".*")]
            shutil.rmtree(path / "cache")
        return f"{set(found)}, left behind {left}" if len(set(found)) != 1 or "Error" in found[0] or left else ""

    return each(seed, tries, one)


def _digest(base):
    return hash(arrays_digest(base.params))
