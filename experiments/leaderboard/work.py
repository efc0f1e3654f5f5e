"""What a leaderboard does, one after the other: the base's score, a row's rate, its runs, paired costs of a step."""

import argparse
import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys

from experiments.leaderboard import compared, rates, report, tables
from experiments.leaderboard.results import key
from launch import bench
from molora_jax import config as config_lib
from molora_jax.errors import InputError


class Failed(Exception):
    """A child that ended without a result; the message is its last words."""


class Board:
    """`lora`: the config of plain LoRA under the same budget; `plan`: `{table: [Entry]}`, what is to be run;
    `entry(table, method, seeds)` makes one more; `left`: `{method: why}`, those left out."""

    def __init__(self, workdir, lora, plan, results, *, entry, protocol=None, left=None):
        self.folder, self.lora, self.plan, self.results = pathlib.Path(workdir), lora, plan, results
        self.entry, self.protocol, self.left = entry, protocol, left or {}
        self._grid_keys, self._others = {}, {}

    def base(self):
        """The frozen model's score, for the first line of the tables."""
        config = self.lora.copy_and_resolve_references()
        with config.unlocked():
            config.method.rules, config.losses, config.method.train_base = {}, {}, ""
        if self.results.tree["base"] is None:
            self._attempt("base", "", "base", lambda: job(config, self.folder / "base"))

    def rate(self, table: str, entry):
        """The row with the learning rate of its grid; as it is where there is no grid, None where it failed."""
        if self.protocol is None or not self.protocol.rates:
            return entry
        number = self._grid_key(entry)
        if self.results.find("grid", number) is None:
            workdir = self.folder / f"{entry.method}-grid-{number}"

            def work():
                found = jobs(rates.grid(entry, self.protocol, self.folder), workdir)
                losses = {rate: rates.mean(result) for rate, result in found.items()}
                if not any(losses.values()):
                    raise Failed("no learning rate of the grid came to a finite loss")
                facts = dict(method=entry.method, changes=entry.changes, machine=machine(entry.configs[0]))
                return facts | dict(losses=losses, rate=rates.best(losses))

            if not self._attempt("grid", number, f"{table}: {entry.method}, learning rates", work):
                return None
            shutil.rmtree(workdir, ignore_errors=True)
        return rates.settled(entry, self.results.find("grid", number)["rate"])

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
        if self.protocol is None or not self.protocol.rates:
            report.write(self.results.path.parent, self.results.tree, self.shown())
        else:
            compared.write(self.results.path.parent, self.results.tree, self.known(self.shown()), left=self.left)

    def shown(self) -> dict:
        """The plan without variants, and all that earlier starts have run: files name every row that is known."""
        seeds, out = {}, {}
        for run in (*self.results.tree["runs"], *self.results.tree["grid"]):  # a grid has no seed of the results
            seeds[run["method"]] = max(seeds.get(run["method"], 0), run.get("seed", 0) + 1)
        for table in self.plan if self.protocol is None else tables.TABLES:
            planned = {entry.method: entry for entry in self.plan.get(table, ())}
            out[table] = []
            for method in tables.check_methods("all", (tables.FULL,)):
                entry, count = planned.get(method), seeds.get(method, 0)
                if method not in self.left and count > (len(entry.configs) if entry else 0):
                    if (table, method, count) not in self._others:
                        self._others[table, method, count] = self.entry(table, method, count)
                    entry = self._others[table, method, count]
                if entry is not None:
                    out[table].append(entry)
        return {table: entries for table, entries in out.items() if table in self.plan or self._has_runs(entries)}

    def _has_runs(self, entries) -> bool:
        return any(report.Row(entry, self.results.tree).runs for entry in self.known({"": entries})[""])

    def known(self, plan=None) -> dict:
        """The plan, each row with its rate where that is known; another row has no runs yet."""
        plan = self.plan if plan is None else plan
        if self.protocol is None or not self.protocol.rates:
            return plan
        out = {}
        for table, entries in plan.items():
            out[table] = []
            for entry in entries:
                grid = self.results.find("grid", self._grid_key(entry))
                found = dict(grid=grid["losses"], rate=grid["rate"]) if grid else {}
                entry = rates.settled(entry, grid["rate"]) if grid else dataclasses.replace(entry, configs=())
                out[table].append(dataclasses.replace(entry, **found))
        return out

    def _grid_key(self, entry) -> str:
        own = key(entry.configs[0])
        if own not in self._grid_keys:
            self._grid_keys[own] = key(next(iter(rates.grid(entry, self.protocol, self.folder).values())))
        return self._grid_keys[own]

    def check(self, table: str, entry, seed: int) -> bool:
        """Runs a finished run anew, in a folder of its own; whether it has the same bits."""
        config = entry.configs[seed]
        before = self.results.find("runs", key(config))
        if before is None:
            raise InputError(
                "--check",
                got=f"{table}: {entry.method}, seed {seed}: not in {self.results.path}",
                expected="a run that is there",
            )
        workdir = self.folder / "check"
        shutil.rmtree(workdir, ignore_errors=True)
        say(f"{table}: {entry.method}, seed {seed}, again ...")
        again = job(config, workdir)
        shutil.rmtree(workdir, ignore_errors=True)
        same = all(again[name] == before[name] for name in ("nll", "digest"))
        said = [f"trained values {found['digest']}, {summary(found)}" for found in (before, again)]
        say(f"{'the same bits' if same else 'NOT the same bits'}: then {said[0]}; now {said[1]}")
        theirs, ours = before["machine"], machine(config)
        if not same and theirs != ours:
            say(f"it was made on {theirs}, this is {ours}: bits are promised for one kind of machine and one jax")
        return same

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
    """A run in a child process; see `jobs`."""
    return jobs({"run": config}, workdir)["run"]


def jobs(configs: dict, workdir: pathlib.Path) -> dict:
    """Runs in a child process, several in one step. Its screen goes to `WORKDIR.log`; it ends with us.

    Raises:
      Failed: it ended without a result.
    """
    workdir.parent.mkdir(parents=True, exist_ok=True)
    log = workdir.with_name(workdir.name + ".log")
    asked = {"configs": {name: config_lib.to_dict(config) for name, config in configs.items()}, "workdir": str(workdir)}
    with open(log, "w", encoding="utf-8") as screen:
        child = subprocess.Popen(
            [sys.executable, "-m", "experiments.leaderboard.one"], text=True, stderr=screen,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        try:
            out, _ = child.communicate(json.dumps(asked))
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
    if "losses" in done:
        said = ", ".join(
            f"{rate}: {'none' if loss is None else f'{loss:.4f}'}" for rate, loss in done["losses"].items()
        )
        return f"{done['rate']} of {said}"
    mean = sum(done["nll"].values()) / len(done["nll"])
    more = f", loss {done['first5']:.3f} -> {done['last5']:.3f}, {done['seconds']:.0f} s" if "seconds" in done else ""
    return f"NLL {mean:.4f}{more}"
