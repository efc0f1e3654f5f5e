"""What a leaderboard does, one after the other: the base's score, the runs, the paired costs of a step."""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys

from experiments.leaderboard import report
from experiments.leaderboard.results import key
from launch import bench
from molora_jax import config as config_lib
from molora_jax.errors import InputError


class Failed(Exception):
    """A child that ended without a result; the message is its last words."""


class Board:
    """`lora`: the config of plain LoRA under the same budget; `plan`: `{table: [Entry]}`."""

    def __init__(self, workdir, lora, plan, results):
        self.folder, self.lora, self.plan, self.results = pathlib.Path(workdir), lora, plan, results

    def base(self):
        """The frozen model's score, for the first line of the tables."""
        config = self.lora.copy_and_resolve_references()
        with config.unlocked():
            config.method.rules, config.losses = {}, {}
        if self.results.tree["base"] is None:
            self._attempt("base", "", "base", lambda: job(config, self.folder / "base"))

    def run(self, table: str, entry, seed: int):
        config = entry.configs[seed]
        number = key(config)
        if self.results.find("runs", number) is not None:
            return
        workdir = self.folder / f"{entry.method}-{number}"

        def work():
            facts = dict(method=entry.method, changes=entry.changes, seed=seed, machine=machine(config))
            return facts | job(config, workdir)

        if self._attempt("runs", number, f"{table}: {entry.method}, seed {seed}", work):
            shutil.rmtree(workdir, ignore_errors=True)  # the row is what is kept

    def cost(self, table: str, entry, steps: int):
        """A step against one of plain LoRA, in turn, as `launch.bench` measures it."""
        config = entry.configs[0]
        number = key(config)
        if self.results.find("costs", number) is not None:
            return
        options = bench_options(config, steps=steps, threads=1, no_update=False, generate=False)

        def work():
            made = bench.measure({"a": config, "b": self.lora}, options)
            facts = dict(method=entry.method, changes=entry.changes, machine=made["machine"])
            return facts | dict(ratio=made["ratio"], cpu_seconds=made["a"]["cpu_seconds"])

        self._attempt("costs", number, f"{table}: cost of {entry.method}", work)

    def write(self):
        report.write(self.results.path.parent, self.results.tree, self.plan)

    def _attempt(self, kind: str, number: str, name: str, work) -> bool:
        say(f"{name} ...")
        try:
            done = work()
        except (InputError, Failed, SystemExit) as error:
            self.results.fail(kind, number, f"{name}: {error}")
            say(f"{name} failed: {error}")
            return False
        self.results.add(kind, number, done)
        say(f"{name}: {summary(done)}")
        self.write()
        return True


def job(config, workdir: pathlib.Path) -> dict:
    """A run in a child process. Its screen goes to `WORKDIR.log`; it ends with us.

    Raises:
      Failed: it ended without a result.
    """
    workdir.parent.mkdir(parents=True, exist_ok=True)
    log = workdir.with_name(workdir.name + ".log")
    with open(log, "w", encoding="utf-8") as screen:
        child = subprocess.Popen(
            [sys.executable, "-m", "experiments.leaderboard.one"], text=True, stderr=screen,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        try:
            out, _ = child.communicate(json.dumps({"config": config_lib.to_dict(config), "workdir": str(workdir)}))
        except BaseException:
            child.terminate()  # it saves a checkpoint, from which the next start goes on
            child.wait()
            raise
    result = json.loads(out.splitlines()[-1]) if child.returncode == 0 and out.strip() else {}
    if "error" in result:
        raise Failed(result["error"])
    if not result:
        words = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise Failed(f"status {child.returncode}: {words[-1] if words else 'no output'}")
    log.unlink()
    return result


def machine(config) -> dict:
    """Processor, versions and batch, as `launch.bench` reports them."""
    return bench.machine(bench_options(config, threads=len(os.sched_getaffinity(0))))


def bench_options(config, **more):
    return argparse.Namespace(
        batch=config.train.batch_size, seq=config.data.seq_len, dtype=config.base.dtype, **more
    )  # fmt: skip


def say(text: str):
    print(text, file=sys.stderr, flush=True)


def summary(done: dict) -> str:
    if "ratio" in done:
        return "{median:.2f} times plain LoRA ({min:.2f} to {max:.2f})".format(**done["ratio"])
    mean = sum(done["nll"].values()) / len(done["nll"])
    more = f", loss {done['first5']:.3f} -> {done['last5']:.3f}, {done['seconds']:.0f} s" if "seconds" in done else ""
    return f"NLL {mean:.4f}{more}"
