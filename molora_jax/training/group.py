"""Several runs in one step: `train_together` is `train` for runs that differ in seed, learning rate, loss weights or
data.

Every run keeps its own folder, config, manifest, checkpoints and metrics; they share the base, the mesh and the
compiled step (`many.over_runs`). A run of the group is an ordinary run: it opens, is evaluated, can go on by itself.

All runs stand at one step. Whoever saves, all save, each once all have the step before, and each keeps at least two
steps: so after a kill there is a step which all have. The group goes on from the newest such step, and from there every
bit is as if it had not been killed.
"""

import contextlib
import dataclasses
import json
import pathlib
import time

import jax
import numpy as np

from molora_jax import config as config_lib
from molora_jax import sharding
from molora_jax.backbones.compile import apart, compile_losses
from molora_jax.config.members import attribute
from molora_jax.errors import InputError, local
from molora_jax.io import disk
from molora_jax.io.files import write_atomically
from molora_jax.regimes import Stages, compile_regime, stage_at, stage_of
from molora_jax.runs.folders import GROUP
from molora_jax.runs.metrics import MetricsWriter, Progress, duration
from molora_jax.runs.obstacles import not_saved, obstacles
from molora_jax.runs.workdir import Workdir
from molora_jax.text import table
from molora_jax.training import many
from molora_jax.training.collapse import CollapseWatch
from molora_jax.training.loop import (
    MAX_SKIPPED,
    Result,
    clock_of,
    not_finite,
    peak_bytes,
    row,
    tell_the_start,
    tell_what_trains,
)
from molora_jax.training.loss_picture import plot_loss, plot_losses
from molora_jax.training.programs import Program
from molora_jax.training.run import TrainingRun
from molora_jax.training.signals import StopRequest
from molora_jax.training.tracker import tracker


def train_together(configs: dict, folder, *, note=None) -> dict[str, Result]:
    """Trains, or goes on with, the runs `folder/NAME` of `configs`, in one step.

    Args:
      configs: `{name: validated config}`; they differ in nothing but what `config.several` lets differ.

    Raises:
      InputError: before anything is compiled, for anything that is the user's to change; after the last step, where a
        run has had no finite gradient (the others are unharmed).
    """
    first = next(iter(configs.values()))
    refused = unfit(first)
    if refused is not None:
        raise refused
    began, progress = time.monotonic(), Progress(first.train.steps, log_every=first.train.log_every)
    note, folder = note or progress.note, pathlib.Path(local("workdir", folder)).expanduser()
    with contextlib.ExitStack() as held:
        stop = held.enter_context(StopRequest())
        held.enter_context(obstacles(folder))
        workdirs = {name: held.enter_context(Workdir(folder / name)) for name in configs}
        runs = {}
        for name, workdir in workdirs.items():
            told = lambda text, name=name: note(f"{name}: {text}")  # noqa: E731
            beside = next(iter(runs.values()), None)
            runs[name] = TrainingRun(workdir.followed(configs[name], told), workdir, note=told, beside=beside)
        group = Group(runs, folder, progress, note, began)
        for run in runs.values():
            held.enter_context(run.checkpoints)
        return group.train(stop)


def unfit(config) -> InputError | None:
    """Why runs of a config cannot share a step, whatever they differ in; None where they can."""
    if jax.process_count() > 1:
        return InputError(
            "--runs", got=f"{jax.process_count()} processes", expected="one process (of any number of devices)",
            fix="Start the runs one by one.",
        )  # fmt: skip
    if type(compile_regime(config)) is not Stages:
        return InputError(
            "--runs", got=f"regime.name={config.regime.name!r}", expected="'stages'",
            fix="What such a regime does between its stages is one run's: start them one by one.",
        )  # fmt: skip
    if config.train.get("exact", False):
        return InputError(
            "--runs", got="train.exact", expected="train.exact=False",
            fix="Its programs are of one device and one run each, so nothing would be shared: start them one by one.",
        )  # fmt: skip
    if config.train.get("patience", 0):
        return InputError(
            "--runs", got=f"train.patience={config.train.patience}", expected="0: all runs take their steps together",
            fix="Start the runs one by one.",
        )  # fmt: skip
    kept = next((name for name, loss in apart(compile_losses(config))[1] if loss.PENALTY), None)
    if kept is not None:
        return InputError(
            "--runs", got=f"losses.{kept}", expected="no penalty that remembers: its memory is one run's",
            fix="Start the runs one by one.",
        )  # fmt: skip
    return None


class Group:
    """Runs of one program, and where they stand."""

    def __init__(self, runs: dict[str, TrainingRun], folder, progress: Progress, note, began: float):
        self.names, self.runs = tuple(runs), tuple(runs.values())
        self.folder, self.progress, self.note = folder, progress, note
        self.first = self.runs[0]
        self.config = self.first.config.train
        self.stages = self.first.stages
        self.began = began
        agree(runs)
        align(runs, note)
        for run in self.runs:  # the step before stays until all have the next one
            run.checkpoints.keep = max(run.checkpoints.keep, 2)
        self._steps: dict[Program, tuple] = {}

    def step(self, stage):
        """`(step, take, frozen models)` of a stage: compiled at its first use, the step's state donated."""
        program = self.first.programs[stage.name]
        if program not in self._steps:
            compiled = self.first.compiled(stage)
            fixed, axes = many.shared_or_stacked([run.fixed(program.objective) for run in self.runs])
            shardings, whole = many.shardings(compiled.shardings), sharding.replicated(self.first.mesh)
            step = jax.jit(many.over_runs(compiled.plain, axes), donate_argnums=0, out_shardings=(shardings, whole))
            stack = jax.jit(lambda *states: many.stack(states), out_shardings=shardings)
            self._steps[program] = step, jax.jit(many.take, out_shardings=compiled.shardings), stack, fixed
        return self._steps[program]

    def apart(self, stage, state) -> list:
        """The state of every run."""
        _, take, _, _ = self.step(stage)
        return [take(state, number) for number in range(len(self.runs))]

    def train(self, stop) -> dict[str, Result]:
        steps = self.first.config.train.steps
        self.progress.steps = last = min(self.config.stop_after or steps, steps)
        states = [run.restore_or_start() for run in self.runs]
        start = int(states[0].step)
        self.note(f"{len(self.runs)} runs in one step; of each:")
        tell_the_start(self.first, start, self.note)
        told = set()
        for name, run in zip(self.names, self.runs, strict=True):
            if run.data.fingerprint not in told:
                self.note(f"{name}:\n{run.table}")
                told.add(run.data.fingerprint)
        self._write_names()
        for run, state in zip(self.runs, states, strict=True):
            if start == 0 and not run.checkpoints.steps():
                run.save(state, 0)  # before the first compile, so that a kill inside it loses nothing
        self.timed = clock_of(self.first, start, self.began)
        return self._loop(states, start, last, stop)

    def _write_names(self):
        text = json.dumps({"runs": list(self.names)}, indent=1) + "\n"
        disk.patiently(lambda: write_atomically(self.folder / GROUP, text))

    def _loop(self, states, start, last, stop) -> dict[str, Result]:
        began, step, saved = time.monotonic(), start, start
        logs = [_Log(run, start) for run in self.runs]
        batches, stage, pending, clock = [], stage_at(self.stages, start), None, time.monotonic()
        state = self.step(stage)[2](*states)
        states.clear()  # one copy is enough
        current = None

        def flush():
            """Writes the metrics of a step that is done (one step late, so that the device never waits for us)."""
            nonlocal pending, clock
            if pending is None:
                return
            (number, values, extra, model), pending = pending, None
            values, now = jax.device_get(values), time.monotonic()
            speeds = self.timed.rows([int(n) for n in values["tokens"]], now - clock)
            for n, log in enumerate(logs):
                own = jax.tree.map(lambda x, n=n: x[n], values)
                log.write(number, own, speeds[n] | extra[n], now - clock, model)
            clock = now
            losses, tokens = [log.loss for log in logs], int(np.sum(values["tokens"]))
            self.progress.update(number, loss=losses, tokens=tokens)
            for name, log in zip(self.names, logs, strict=True):
                if log.skipped == MAX_SKIPPED:
                    self.note(f"{name}: no finite gradient for {MAX_SKIPPED} steps in a row; the other runs go on")
            if all(log.skipped >= MAX_SKIPPED for log in logs):
                raise not_finite(min(log.skipped for log in logs), number)

        try:
            while step < last and not stop.requested:
                now = stage_at(self.stages, step)
                for run in self.runs:
                    run.workdir.check_there()
                if now is not current:
                    state = state if current is None else self._enter(current, now, state)
                    stage = current = now
                    for stream in batches:
                        stream.close()
                    batches = [run.source(stage).iterate(step) for run in self.runs]
                    knobs = many.stack([run.knobs[stage.name] for run in self.runs])
                    fresh = self.first.programs[stage.name] not in self._steps or step == start
                    if fresh:
                        self.note("compiling the step (seconds to a minute, cached for the next start)")
                    run_step, _, _, fixed = self.step(stage)
                with self.timed.of("data"):
                    rows = [next(stream)[1] for stream in batches]
                batch = many.put_batches(rows, self.first.mesh)
                with self.timed.of("compile") if fresh else contextlib.nullcontext():
                    state, values = run_step(state, self.first.params, batch, fixed, knobs)
                fresh = False
                step += 1
                flush()
                pending = step, values, [{} for _ in self.runs], self.first.programs[stage.name].model
                best = self._evaluate(stage, step, state, pending[2])
                if any(best) or step == last or (self.config.save_every and step % self.config.save_every == 0):
                    flush()
                    with self.timed.of("checkpoint"):
                        self._save(step, state, best)
                    saved = step
                else:
                    for run in self.runs:
                        if run.checkpoints.last_save_failed:
                            run.checkpoints.check()
            flush()
            if step > saved:
                self._save(step, state, [False] * len(self.runs))
            self._saved(step, state)
        finally:
            for stream in batches:
                stream.close()
            for run in self.runs:
                run.checkpoints.close()
            self.progress.close()
            for log in logs:
                log.close()
        seconds = time.monotonic() - began
        results = [Result(step, log.loss, seconds, log.tokens, peak_bytes(), stop.signal) for log in logs]
        self._finish(results, start)
        for name, log in zip(self.names, logs, strict=True):
            if step > start and log.skipped >= min(step - start, MAX_SKIPPED):
                raise not_finite(log.skipped, step).inside(name)
        return dict(zip(self.names, results, strict=True))

    def _enter(self, stage, following, state):
        states = [run.enter(following, own) for run, own in zip(self.runs, self.apart(stage, state), strict=True)]
        tell_what_trains(self.first, following, stage, self.note)
        return self.step(following)[2](*states)

    def _evaluate(self, stage, step, state, extra) -> list[bool]:
        """Which runs have their best held-out loss now."""
        best = [False] * len(self.runs)
        if not self.config.eval_every or step % self.config.eval_every:
            return best
        with self.timed.of("evaluation"):
            for n, (run, own) in enumerate(zip(self.runs, self.apart(stage, state), strict=True)):
                extra[n]["valid_nll"] = valid = run.valid_nll(run.programs[stage.name], own)
                best[n] = run.is_best(valid)
        told = "  ".join(f"{e['valid_nll']:.4f}{' (best)' if b else ''}" for e, b in zip(extra, best, strict=True))
        self.note(f"step {step}: valid NLL {told}")
        return best

    def _save(self, step, state, best):
        for run in self.runs:  # none is two saves ahead of another: a kill would leave no step that all have
            run.checkpoints.wait()
        for run, own, is_best in zip(self.runs, self.apart(stage_of(self.stages, step), state), best, strict=True):
            run.save(own, step, best=is_best)

    def _saved(self, step, state):
        """The last step of every run is on the disk."""
        for n, run in enumerate(self.runs):
            run.checkpoints.wait()
            if run.checkpoints.last_save_failed:
                run.save_patiently(self.apart(stage_of(self.stages, step), state)[n], step)
            run.workdir.check_there()
            if step not in run.checkpoints.steps():
                raise not_saved(step, run.checkpoints.failures)

    def _finish(self, results, start):
        rows = [("run", "steps", "loss", "checkpoint")]
        for name, run, result in zip(self.names, self.runs, results, strict=True):
            loss = "-" if result.loss is None else f"{result.loss:.4f}"
            rows.append((name, f"{start} -> {result.step}", loss, f"{run.checkpoints.directory}/{result.step}"))
        self.note(table(rows))
        first, tokens = results[0], sum(result.tokens for result in results)
        rate = tokens / first.seconds if first.step > start else 0.0
        self.note(
            f"together: {rate:,.0f} tokens/s with compile, {duration(first.seconds)}, "
            f"peak memory {first.peak_bytes / 1e9:.2f} GB"
        )
        if first.step > start:
            self.note(self.timed.told())
        for run in self.runs:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # not worth an error
                plot_loss(run.workdir)
        try:
            path = plot_losses(self.folder, self.names)
        except (OSError, ValueError, KeyError, TypeError) as error:
            path = f"not written ({error})"
        self.note(f"loss curves: {path}")
        if self.config.stop_after and start >= self.config.stop_after:
            self.note(f"nothing to do: the runs are at step {start}, train.stop_after is {self.config.stop_after}")
        if first.signal is not None:
            self.note(f"stopped by signal {first.signal} after step {first.step}: the same command goes on from there")


class _Log:
    """The metrics of one run, and what the loop reads of them."""

    def __init__(self, run, start):
        self.metrics = MetricsWriter(run.workdir, after_step=start, warn=run.note)
        self.watch = CollapseWatch(run.config, run.note)
        self.track = tracker(run.config, run.workdir, as_dict=config_lib.to_dict(run.config), note=run.note)
        self.loss, self.tokens, self.skipped = None, 0, 0

    def write(self, step, values, extra, seconds, model):
        self.loss, self.skipped = float(values["loss"]), int(values["skipped"])
        self.tokens += int(values["tokens"])
        line = row(step, values, seconds) | self.watch.seen(step, values["site"], model) | extra
        self.metrics.write(line)
        self.track.log(line)

    def close(self):
        self.metrics.close()
        self.track.close()


def agree(runs: dict[str, TrainingRun]):
    """Gives all runs one program a stage, with the larger of their bounds.

    Raises:
      InputError: what makes their programs differ.
    """
    (first_name, first), *others = runs.items()
    bound = max(run.targets_per_row for run in runs.values())
    segments = max(run.model.max_segments for run in runs.values())
    steps = {run.config.train.steps for run in runs.values()}
    if len(steps) > 1:
        raise InputError(
            "--runs", got=f"{' and '.join(map(str, sorted(steps)))} steps (train.epochs of their data)",
            expected="runs of as many steps", fix="Set train.steps, and train.epochs=0.",
        )  # fmt: skip
    same_names = len({run.model.tasks for run in runs.values()}) == 1
    for name, run in runs.items():
        run.targets_per_row = bound
        for stage, program in run.programs.items():
            run.programs[stage] = _common(name, program, segments, same_names)
    for name, run in others:
        for stage, program in run.programs.items():
            own, theirs = (vars(p) for p in (program, first.programs[stage]))
            for field in own:
                if own[field] != theirs[field]:
                    raise InputError(
                        f"--runs, {name}", got=f"another {field} of the step than {first_name}",
                        expected="runs of one program (equal shapes, equal numbers of classes)",
                        fix="Start such runs one by one.",
                    )  # fmt: skip


def _common(name: str, program: Program, segments: int, same_names: bool) -> Program:
    model = dataclasses.replace(program.model, max_segments=segments)
    if not same_names:
        named = [loss for loss, _ in model.losses if attribute("losses", loss, "TASKS")]
        if named:
            raise InputError(
                f"--runs, {name}", got=f"other tasks, of which losses.{named[0]} names some",
                expected="the same tasks in all runs", fix="Start such runs one by one.",
            )  # fmt: skip
        model = dataclasses.replace(model, tasks=())
    return dataclasses.replace(program, model=model)


def align(runs: dict[str, TrainingRun], note):
    """Sets every run to the newest step that all have: where a kill came between their saves, one save back.

    Raises:
      InputError: they stand further apart; what a run has learned by itself is not thrown away.
    """
    at = min(run.newest or 0 for run in runs.values())
    for name, run in runs.items():
        if run.newest in (at, None) and (run.newest is not None or at == 0):
            continue
        if run.newest is None or at != max((s for s in run.checkpoints.steps() if s < run.newest), default=None):
            stand = ", ".join(f"{other} at {r.newest or 0}" for other, r in runs.items())
            raise InputError(
                "--runs", got=f"runs that stand at steps of their own ({stand})", expected="one step that all have",
                fix="Go on with those that are behind by themselves (launch.train with the fields of that run, its "
                "folder as --workdir, and train.stop_after), or choose another --workdir.",
            )  # fmt: skip
        note(f"{name}: back from step {run.newest} to {at}, the newest that all runs have")
        run.newest = at
