"""The training loop: everything that is not a pure function of arrays.

restore or start -> for every stage: compile its step -> batch, step, metrics, checkpoint -> table and picture

How the steps are cut into stages, whose rows they read and what happens between them is the regime's (`regimes.base`).
With runs side by side (federated clients) a turn of the loop is an optimizer step of each.
"""

import contextlib
import dataclasses
import math
import pathlib
import resource
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from molora_jax import config as config_lib
from molora_jax import sharding, stores
from molora_jax.core import trees
from molora_jax.errors import InputError
from molora_jax.regimes import base as regimes
from molora_jax.regimes import stage_at
from molora_jax.runs.metrics import MetricsWriter, Progress, duration
from molora_jax.runs.metrics_file import MAX_SKIPPED
from molora_jax.runs.obstacles import not_saved, obstacles, stop_trace
from molora_jax.runs.workdir import Workdir, at_hand
from molora_jax.text import table
from molora_jax.training import many, summary
from molora_jax.training.clock import Clock
from molora_jax.training.collapse import CollapseWatch
from molora_jax.training.flops import per_token
from molora_jax.training.loss_picture import plot_loss
from molora_jax.training.run import TrainingRun
from molora_jax.training.signals import SIGNALS, StopRequest
from molora_jax.training.step import COUNTS
from molora_jax.training.tracker import NoTracker, tracker
from molora_jax.training.watchdog import Watchdog

RETRY_SECONDS = 10.0  # from a failed save to the next try, doubled each time; the steps of save_every try anyway
ALONE = (signal.SIGINT,)  # of several processes: SIGTERM is heard by jax, which agrees with the others on a step


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run came to: the last `step`, its `loss`, `seconds` and `tokens` of this start; `signal` that ended it,
    `stopped`: "patience" where `train.patience` did."""

    step: int
    loss: float | None
    seconds: float
    tokens: int
    peak_bytes: int
    signal: int | None = None
    stopped: str = ""


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def train(config, workdir: str, *, profile: bool = False, note=None) -> Result:
    """Trains, or goes on with, the run in `workdir`.

    Args:
      config: with the fields of `configs/common.py`.
      profile: writes a trace of steps 3 to 5 of this start to `workdir/profile`.
      note: where lines of text go; by default the progress line's own stream.

    Raises:
      InputError: before anything is compiled, for anything that is the user's to change.

    >>> import molora_jax as mj
    >>> fields = {"base.source": "random:tiny", "data.tasks": "jsonl:double.jsonl", "train.steps": 2}
    >>> result = mj.train(mj.load_config("lora", fields), "runs/a", note=lambda line: None)
    >>> result.step, result.loss > 0
    (2, True)
    """
    config_lib.validate(config)
    began, writer = time.monotonic(), jax.process_index() == 0
    progress = Progress(config.train.steps, log_every=config.train.log_every)
    note = note or (progress.note if writer else lambda text: None)
    folder = at_hand(workdir) if stores.is_url(workdir) else workdir
    watchdog = Watchdog(config.train.get("hang_seconds", 0.0), folder, process=jax.process_index())
    signals = SIGNALS if jax.process_count() == 1 else ALONE
    with (
        Workdir(workdir, writer=writer, note=note) as opened, StopRequest(signals=signals) as stop,
        obstacles(folder), watchdog,
    ):  # fmt: skip
        run = TrainingRun(opened.followed(config, note), opened, note=note)
        steps = run.config.train.steps
        if steps != config.train.steps and not config.train.get("epochs", 0.0):
            note(f"train.steps: {config.train.steps} asked for, {steps} made: whole turns of {run.turn} clients")
        progress.devices = run.mesh.size
        start = run.newest or 0
        last = start if run.patience.over else min(config.train.stop_after or steps, steps)
        progress.steps = last
        state = run.restore_or_start()
        tell_the_start(run, start, note)
        note(str(run.table))
        clock = clock_of(run, start, began)
        with run.checkpoints:
            if start == 0 and not run.checkpoints.steps():
                with clock.of("checkpoint"):
                    run.save(state, 0)  # before the first compile, so that a kill inside it loses nothing
            return _loop(run, state, start, last, stop, progress, note, profile, writer, watchdog, clock)


def _loop(run, state, start, last, stop, progress, note, profile, writer, watchdog, timed) -> Result:
    config, began, tokens, loss, skipped = run.config.train, time.monotonic(), 0, None, 0
    metrics = MetricsWriter(run.workdir, after_step=start, every=run.turn, warn=note) if writer else None
    turn = run.turn
    watch, track = CollapseWatch(run.config, note), NoTracker()
    if writer:
        track = tracker(run.config, run.workdir, as_dict=config_lib.to_dict(run.config), note=note)
    again, patience = math.inf, RETRY_SECONDS  # when a failed save is tried again beside the save steps
    pending, clock = None, time.monotonic()
    step = saved = start
    trace, tracing = (None, None), False
    if profile and last < start + 3 * turn:
        note(f"no trace: --profile needs {3 * turn} steps, {last - start} are left")
    elif profile:
        trace = start + 2 * turn, min(start + 5 * turn, last)  # the first two compile and warm up

    def flush(entry):
        """Writes the metrics of a step that is done (one step late, so that the device never waits for us)."""
        nonlocal clock, tokens, loss, skipped
        if entry is None:
            return
        number, values, measured, own = entry
        values = jax.device_get(values)
        values = many.as_one(values) if run.regime.side_by_side else values
        now, before = time.monotonic(), clock
        clock, loss, count = now, float(values["loss"]), int(values["tokens"])
        tokens += count
        speed = timed.row(count, now - before)
        if writer:
            told = watch.seen(number, values["site"], run.programs[stage_at(run.stages, number - 1).name].model)
            line = regimes.added(row(number, values, now - before) | speed | told | measured, own)
            metrics.write(line)
            track.log(line)
        progress.update(number, loss=loss, tokens=count) if writer else None
        skipped = int(values["skipped"])
        if skipped >= MAX_SKIPPED:
            raise not_finite(skipped, number)

    batches, source, stage, best, valid = None, None, None, False, None
    try:
        while step < last and not _stopping(stop, step):
            watchdog.beat(f"step {step + turn}")
            run.workdir.check_there()
            now = stage_at(run.stages, step)
            if now is not stage:
                if stage is not None:
                    state = run.enter(now, state)
                    tell_what_trains(run, now, stage, note)
                stage, compiled = now, run.compiled(now)
                if run.source(stage) is not source:
                    if batches is not None:
                        batches.close()
                    source = run.source(stage)
                    rows = None if run.regime.side_by_side else sharding.rows_of_process(config.batch_size, run.mesh)
                    batches = source.iterate(step // turn, rows=rows)
                arguments = run.arguments(stage)
            if step == trace[0]:
                tracing = True
                jax.profiler.start_trace(str(pathlib.Path(run.workdir) / "profile"))
            if not compiled.ready:
                note("compiling the step (seconds to a minute, cached for the next start)")
            with timed.of("data"):
                _, batch = next(batches)
            batch = run.put(batch)
            with contextlib.nullcontext() if compiled.ready else timed.of("compile"):
                compiled.compile_together(state, run.params, batch, *arguments, step=step)
                state, values = compiled.step(state, run.params, batch, *arguments)
            step = run.step_now = step + turn
            due = lambda every, step=step: bool(every) and step // every > (step - turn) // every  # noqa: E731
            flush(pending)
            pending = (step, values, {}, {})
            if step == trace[1]:
                jax.block_until_ready(values)
                tracing = False
                note(
                    stop_trace(
                        f"trace of steps {start + 2 * turn + 1} to {step}: {pathlib.Path(run.workdir) / 'profile'}"
                    )
                )
            if step >= stage.stop:
                state, own = run.leave(stage, state)
                pending[3].update(own)
            best = False
            if due(config.eval_every):
                watchdog.beat(f"the evaluation at step {step}")
                with timed.of("evaluation"):
                    valid = run.valid_nll(compiled.program, run.server(stage, state))
                best = run.is_best(valid)
                pending[2]["valid_nll"] = valid
                note(f"step {step}: valid NLL {valid:.4f}{' (best)' if best else ''}")
                pending[2].update(run.out_of_patience(stage, valid))
                if run.patience.over:
                    last = step
            if best or step >= last or due(config.save_every):
                flush(pending)
                pending = None
                watchdog.beat(f"the save of step {step}")
                with timed.of("checkpoint"):
                    run.save(state, step, best=best)
                saved, again = step, math.inf
            elif run.checkpoints.last_save_failed:
                run.checkpoints.check()
                run.workdir.check_there()
                if not run.checkpoints.steps():  # known within the first compile: nothing would be left of this run
                    if jax.process_count() > 1 or not run.checkpoints.failures[-1].passing:
                        raise not_saved(0, run.checkpoints.failures)
                    run.save_patiently(state, step)
                    saved, again = step, math.inf
                elif jax.process_count() == 1 and again == math.inf:
                    again, patience = time.monotonic() + patience, 2 * patience
                elif time.monotonic() > again:
                    run.save(state, step)
                    saved, again = step, math.inf
        flush(pending)
        pending = None
        watchdog.beat("the last save")
        run.checkpoints.wait()
        if jax.process_count() == 1 and (step > saved or run.checkpoints.last_save_failed):
            run.save_patiently(state, step, best=valid if best and saved == step else None)
        elif step > saved:
            run.save(state, step)
    finally:
        if batches is not None:
            batches.close()
        if tracing:
            stop_trace("")
        failures = run.checkpoints.close()
        progress.close()
        if metrics is not None:
            metrics.close()
        track.close()
    run.workdir.check_there()
    if run.checkpoints.last_save_failed or (writer and step not in run.checkpoints.steps()):
        raise not_saved(step, failures)
    ended = "patience" if run.patience.over else ""
    result = Result(step, loss, time.monotonic() - began, tokens, peak_bytes(), stop.signal, ended)
    if writer:
        _finish(run, result, start, note, timed)
    if step > start and skipped >= step - start:  # too short to give up on the way
        raise not_finite(skipped, step)
    return result


def clock_of(run, start, began: float) -> Clock:
    """The clock of a start, which knows the FLOPs of the stage of this step."""
    stage = stage_at(run.stages, start)
    program, shapes = run.programs[stage.name], run.compiled(stage).shapes
    flops = per_token(program.model, shapes.adapters, shapes.modules, program.frozen, run.config.data.seq_len)
    return Clock(run.mesh.devices.flat, flops, began=began)


def tell_the_start(run, start, note):
    """The machine, the base, and what trains in the stage of this step."""
    stage = stage_at(run.stages, start)
    program, shapes = run.programs[stage.name], run.compiled(stage).shapes
    note(summary.machine(run.mesh, run.config.base.dtype))
    if run.config.base.get("quant", "none") != "none":
        note(summary.base_table(run.params))
    count = trees.count(run.params)
    note(summary.rules_table(program.model, shapes.adapters, program.frozen, count, shapes.modules))
    note(summary.sites_table(shapes.adapters, program.frozen, shapes.modules))
    later = [s for s in run.stages if s.start > start]
    others = [s.name for s in later if run.programs[s.name].trains != program.trains]
    if run.regime.SCHEDULE and others:
        note(f"of stage {stage.name}, to step {stage.stop}: other leaves train in {', '.join(others)}")


def tell_what_trains(run, stage, before, note):
    """The table of a stage in which other leaves train than in the one before."""
    program = run.programs[stage.name]
    if program.trains != run.programs[before.name].trains:
        shapes = run.compiled(stage).shapes
        sites = summary.sites_table(shapes.adapters, program.frozen, shapes.modules)
        note(f"stage {stage.name}, steps {stage.start + 1} to {stage.stop}:\n{sites}")


def not_finite(skipped: int, step: int) -> InputError:
    return InputError(
        "train", got=f"no finite gradient for {skipped} steps in a row (up to step {step})",
        expected="finite gradients",
        fix="Start in another workdir with a lower optim.learning_rate (train.init_from=DIR takes over what this one "
        "learned), or look at the data of these steps; what was trained before is unharmed.",
    )  # fmt: skip


def _stopping(stop: StopRequest, step: int) -> bool:
    """One decision for all processes.

    A SIGTERM (the notice of a preemption) to any of them reaches all at the step on which jax's coordinator agrees; a
    SIGINT is asked for every tenth step, since that costs a collective.
    """
    if jax.process_count() == 1:
        return stop.requested
    if multihost_utils.reached_preemption_sync_point(step):
        stop.signal = signal.SIGTERM
        return True
    return step % 10 == 0 and bool(np.any(multihost_utils.process_allgather(jnp.int32(stop.requested))))


def row(step: int, values: dict, seconds: float) -> dict:
    """A line of metrics.jsonl: the contract's names, `site/<rule>/<scope>/<statistic>` as lists over layers."""
    values = dict(values)
    sites = values.pop("site")
    flat = {f"site/{name}/{s}": v for name, group in sites.items() for s, v in group.items() if s not in COUNTS}
    return {"step": step, **values, **flat, "seconds": round(seconds, 4)}


def _finish(run, result: Result, start: int, note, timed: Clock):
    try:
        path = plot_loss(run.workdir)
    except (OSError, ValueError, KeyError, TypeError) as error:  # done and saved: a picture is not worth an error
        path = f"not written ({error})"
    done = result.step - start
    rate = result.tokens / result.seconds if done else 0.0
    rows = [
        ("steps", "loss", "tokens/s with compile", "time", "peak memory", "checkpoint"),
        (f"{start} -> {result.step}", "-" if result.loss is None else f"{result.loss:.4f}", f"{rate:,.0f}",
         duration(result.seconds), f"{result.peak_bytes / 1e9:.2f} GB", f"{run.workdir}/checkpoints/{result.step}"),
    ]  # fmt: skip
    note(table(rows))
    if done:
        note(timed.told())
    note(f"loss curve: {path}")
    try:
        told = run.regime.report(run, run.memory)
    except OSError as error:
        told = f"the report of the regime is not written ({error.strerror or error})"
    if told:
        note(told)
    if run.config.train.stop_after and start >= run.config.train.stop_after:
        note(f"nothing to do: the run is at step {start}, train.stop_after is {run.config.train.stop_after}")
    if result.stopped:
        again = "" if done else "nothing to do: "
        note(
            f"{again}ended at step {result.step} of {run.config.train.steps} by train.patience="
            f"{run.patience.rounds}: {run.patience.told()} (raise it, or set it to 0, to go on)"
        )
    if result.signal is not None:
        note(f"stopped by signal {result.signal} after step {result.step}: the same command goes on from there")
