"""The same state and samples on other meshes and numbers of devices; with train.exact the same bits of training too."""

import functools
import json
import os
import random
import subprocess
import sys

import jax

from molora_jax.training import run
from tests.faults import opened
from tests.faults.common import changed, copy_run, digests, finished_run, metric_rows, scratch, start, tiny_config
from tests.faults.report import each

SPLITS = (  # data, fsdp, expert, tensor
    (1, 1, 1, 1), (2, 1, 1, 1), (1, 2, 1, 1), (1, 1, 2, 1), (1, 1, 1, 2), (4, 1, 1, 1), (2, 2, 1, 1), (1, 4, 1, 1),
    (2, 1, 2, 1), (1, 2, 1, 2), (1, 1, 4, 1), (8, 1, 1, 1), (4, 2, 1, 1), (4, 1, 2, 1), (2, 2, 2, 1), (2, 1, 2, 2),
    (1, 2, 4, 1), (2, 2, 1, 2),
)  # fmt: skip


def meshed(split, **train):
    config = tiny_config(eval_every=4, **train)
    config.mesh.update(dict(zip(("data", "fsdp", "expert", "tensor"), split, strict=True)))
    return config


def on_devices(number):
    """`run.setup` on the first few devices."""
    return changed(run, setup=functools.partial(run.setup, devices=jax.devices()[:number]))


def _product(split):
    return split[0] * split[1] * split[2] * split[3]


def restored(seed, tries):
    """A run saved on one mesh is opened on another: every bit of its state is the same."""
    source = finished_run()
    with scratch() as path, on_devices(1):
        wanted, _ = opened.resumed(meshed(SPLITS[0]), copy_run(source, path / "run"))

    def one(number):
        split = SPLITS[number % len(SPLITS)]
        with scratch() as path, on_devices(_product(split)):
            found, _ = opened.resumed(meshed(split), copy_run(source, path / "run"))
        other = [key for key in wanted if found[key] != wanted[key]]
        return f"{split}: other {', '.join(other)}" if other else ""

    return each(seed, tries, one)


def saved(seed, tries):
    """Saved on a mesh of the seed's, opened on one device: the digests that were written are those that are read."""

    def one(number):
        rng = random.Random(number)
        split = SPLITS[1 + number % (len(SPLITS) - 1)]
        with scratch() as path:
            with on_devices(_product(split)):
                start(meshed(split, stop_after=2), path / "run")
            written = digests(path / "run", 2)
            there = rng.choice(SPLITS)
            with on_devices(_product(there)):
                found, _ = opened.resumed(meshed(there), path / "run")
            return "" if found["step"] == 2 and written == digests(path / "run", 2) else f"{split} to {there}: {found}"

    return each(seed, tries, one)


def exact(seed, tries):
    """train.exact: losses and adapters are bit-equal on 1, 2, 4 and 8 devices over data and fsdp."""
    splits = [split for split in SPLITS if split[2] == split[3] == 1]

    def trained(split, path):
        config = meshed(split)
        config.train.exact = True
        with on_devices(_product(split)):
            start(config, path)
        return digests(path, 6), {n: row["loss"] for n, row in metric_rows(path).items()}

    with scratch() as path:
        wanted = trained(splits[0], path / "one")

    def one(number):
        split = splits[1 + number % (len(splits) - 1)]
        with scratch() as path:
            found = trained(split, path / "run")
        names = ("state", "losses")
        other = [name for name, a, b in zip(names, found, wanted, strict=True) if a != b]
        return f"{split}: other {' and '.join(other)}" if other else ""

    return each(seed, tries, one)


STATE = """
import json, os, sys
from molora_jax import runtime
runtime.configure()
import jax
from tests.faults.common import start, tiny_config
config = tiny_config(eval_every=4, stop_after=int(sys.argv[2]))
result, _ = start(config, sys.argv[1])
print(json.dumps(result.step), flush=True)
"""


def processes(seed, tries):
    """A run of one process goes on with two, and back: the samples and the state at each step are the run's own."""
    source = finished_run()
    tiny_config()

    def one(number):
        with scratch() as path:
            run = copy_run(source, path / "run")
            for step in ("4", "6"):
                for file in sorted((run / "checkpoints" / step).rglob("*"), reverse=True):
                    file.rmdir() if file.is_dir() else file.unlink()
                (run / "checkpoints" / step).rmdir()
            (run / "checkpoints" / "best.json").unlink()
            before = digests(run, 2)
            outputs = together(STATE, [str(run), "4"], port=20_000 + (os.getpid() * 7 + number) % 20_000)
            if any(status for status, _ in outputs):
                return f"two processes: {[(status, text[-300:]) for status, text in outputs]}"
            if digests(run, 2) != before or [json.loads(text.splitlines()[-1]) for _, text in outputs] != [4, 4]:
                return f"they did not go on from step 2 to 4: {outputs}"
            wanted, rows = metric_rows(source), metric_rows(run)
            if any(rows[n]["tokens"] != wanted[n]["tokens"] for n in (3, 4)):
                return "they took other samples"
            if any(abs(rows[n]["loss"] - wanted[n]["loss"]) > 1e-3 * wanted[n]["loss"] for n in (3, 4)):
                return f"other losses: {[rows[n]['loss'] for n in (3, 4)]}"
            with on_devices(1):
                found, _ = opened.resumed(meshed(SPLITS[0]), run)
            return "" if found["step"] == 4 else f"one process found step {found['step']}"

    return each(seed, tries, one)


def together(code, arguments, *, port, seconds=280):
    """`(status, output)` of two processes of one device each."""
    flags = "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0"
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=os.environ | {
                "MOLORA_COORDINATOR": f"localhost:{port}", "MOLORA_PROCESSES": "2", "MOLORA_PROCESS": str(rank),
                "XLA_FLAGS": flags, "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
            },
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        texts = [child.communicate(timeout=seconds)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    return [(child.returncode, text) for child, text in zip(children, texts, strict=True)]
