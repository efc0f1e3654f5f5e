"""A dead peer: of two processes one is killed; the other ends with an error in time, and what was saved is valid."""

import os
import random
import signal
import subprocess
import sys
import time

from molora_jax.runs.checkpoints import Checkpoints
from tests.faults.common import scratch, tiny_config
from tests.faults.report import each

SECONDS = 150  # the longest that the survivor may take
STEPS = 5000  # never reached

RANK = """
import sys
from molora_jax import runtime
runtime.configure()
from tests.faults import peers
from tests.faults.common import start, tiny_config
from molora_jax.training import loop

def put_batch(*args, function=loop.sharding.put_batch):
    print("step", flush=True)
    return function(*args)

loop.sharding.put_batch = put_batch
start(tiny_config(steps=peers.STEPS, save_every=4, keep=2), sys.argv[1])
"""


def dead(seed, tries):
    tiny_config()

    def one(number):
        rng = random.Random(number)
        port = 20_000 + (os.getpid() * 11 + number) % 20_000
        with scratch() as path:
            children = []
            for rank in (0, 1):
                env = os.environ | {
                    "MOLORA_COORDINATOR": f"localhost:{port}", "MOLORA_PROCESSES": "2", "MOLORA_PROCESS": str(rank),
                    "XLA_FLAGS": "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0",
                    "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
                }  # fmt: skip
                log = open(path / f"log-{rank}", "wb")
                children.append(subprocess.Popen([sys.executable, "-c", RANK, str(path / "run")], env=env, stdout=log,
                                                 stderr=subprocess.STDOUT))  # fmt: skip
                log.close()
            try:
                return _killed(children, path, rng)
            finally:
                for child in children:
                    child.kill()
                    child.wait()

    return each(seed, tries, one)


def _killed(children, path, rng):
    deadline, wanted = time.monotonic() + SECONDS, rng.randrange(2, 40)
    while (path / "log-0").read_bytes().count(b"step\n") < wanted:
        if time.monotonic() > deadline or any(child.poll() is not None for child in children):
            said = [(path / f"log-{rank}").read_text(errors="replace")[-300:] for rank in (0, 1)]
            return f"the two did not come to step {wanted}: {said}"
        time.sleep(0.05)
    victim = rng.randrange(2)
    children[victim].send_signal(signal.SIGKILL)
    survivor = children[1 - victim]
    try:
        status = survivor.wait(SECONDS)
    except subprocess.TimeoutExpired:
        return f"process {1 - victim} goes on {SECONDS} s after the end of process {victim}"
    if status == 0:
        return f"process {1 - victim} ended with status 0 after the end of process {victim}"
    if Checkpoints(path / "run" / "checkpoints", keep=2).newest_valid() is None:
        return "no step is left"
    return ""
