"""The training loop: everything that is not a pure function of arrays.

restore or start -> for every stage: compile its step -> batch, step, metrics, checkpoint -> table and picture

How the steps are cut into stages, whose rows they read and what happens between them is the regime's (`regimes.base`).
With runs side by side (federated clients) a turn of the loop is an optimizer step of each.
"""

import dataclasses
import json
import math
import pathlib
import resource
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils

from molora_jax import config as config_lib
from molora_jax import runtime, sharding
from molora_jax.config.fields import MICRO_SHARDS
from molora_jax.core import trees
from molora_jax.errors import InputError
from molora_jax.io import disk
from molora_jax.io.files import write_atomically
from molora_jax.objectives import Frozen, Objective
from molora_jax.objectives.held_out import example_nll
from molora_jax.regimes import compile_regime, stage_at
from molora_jax.runs import expert_runs, warm_start
from molora_jax.runs import saved as saved_lib
from molora_jax.runs.checkpoints import Checkpoints, read_manifest
from molora_jax.runs.metrics import MetricsWriter, Progress, duration
from molora_jax.runs.modules import in_place
from molora_jax.runs.obstacles import not_saved, obstacles, stop_trace
from molora_jax.runs.workdir import Workdir
from molora_jax.text import table
from molora_jax.training import many, summary
from molora_jax.training.exact import ExactNLL
from molora_jax.training.examples import mean_squares
from molora_jax.training.frozen import START
from molora_jax.training.loss_picture import plot_loss
from molora_jax.training.programs import CompiledStep, Program, compiled_step, knobs_of, program_of
from molora_jax.training.setup import setup
from molora_jax.training.signals import StopRequest
from molora_jax.training.step import TrainState

RETRY_SECONDS = 10.0  # from a failed save to the next try, doubled each time; the steps of save_every try anyway
CLIENTS = ("adapters", "router_state", "modules")  # what every run side by side has of its own, beside `opt`
MAX_SKIPPED = 5  # steps in a row without a finite gradient before the run gives up


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run came to: the last `step`, its `loss`, `seconds` and `tokens` of this start; `signal` that ended it."""

    step: int
    loss: float | None
    seconds: float
    tokens: int
    peak_bytes: int
    signal: int | None = None


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Run:
    """The loop's state: what `setup` made, the workdir, and where it stands."""

    def __init__(self, config, workdir: Workdir, *, note, beside: "Run | None" = None):
        """`beside`: another run of the same base and mesh; this one shares its base."""
        self.workdir, self.note = workdir, note
        recorded = workdir.recorded(saved_lib.manifest_of(workdir, "latest"))
        made = self.setup = setup(config, recorded=recorded, beside=None if beside is None else beside.setup)
        config = self.config = made.config  # with its steps
        runtime.together("set up")
        self.mesh, self.base, self.data = made.mesh, made.base, made.data
        self.model, self.params = made.model, made.params
        self.modules, self.frozen = made.modules, dict(made.frozen)
        self.table = self.data.report()
        self.targets_per_row = self.data.train.targets_per_row
        if made.engines and beside is None:
            note(made.engines)
        if config.train.eval_every and not self.data.heldout("valid", config.eval.num_items):
            raise InputError(
                "train.eval_every", got="no held-out item in the split valid", expected="at least one",
                fix="Give more rows, or set train.eval_every=0.",
            )  # fmt: skip
        self.checkpoints = Checkpoints(pathlib.Path(workdir) / "checkpoints", keep=config.train.keep, warn=note)
        plain = config_lib.to_dict(config)
        try:
            self.newest = self.checkpoints.newest_valid()
        except InputError:  # that the folder is another run's says more than that its steps are damaged
            workdir.refuse_another(plain, made.identity)
            raise
        manifest = None if self.newest is None else read_manifest(self.checkpoints.directory / str(self.newest))
        self.identity = workdir.check_identity(plain, made.identity, manifest=manifest, note=note)
        workdir.write_config(plain)
        if workdir.writer:
            try:
                write_atomically(workdir.path / "data.json", json.dumps(self.table, indent=1) + "\n")
            except OSError as error:  # a report: the run needs it for nothing
                note(f"data.json is not written ({error.strerror or error})")
        self.constrain = sharding.constrain(self.mesh)
        self.exact = config.train.get("exact", False)  # not in runs of older versions
        self.regime = compile_regime(config)
        if jax.process_count() > 1 and not self.regime.PROCESSES:
            raise InputError(
                "regime.name", got=f"{config.regime.name!r} on {jax.process_count()} processes",
                expected="'stages', or one process (of any number of devices)",
                fix="Its rows and what it measures between its stages are formed by one process.",
            )  # fmt: skip
        self.regime.check(config, self.data, self.model)
        self.stages = self.regime.stages(config, self.data)
        self.turn = self.regime.side_by_side or 1  # optimizer steps that a turn of the loop makes
        self.memory, self.step_now, self._sources = {}, self.newest or 0, {}
        self.best = self.best_saved = float("inf")
        self._best_pending = None
        self.programs, self.knobs, made, whole = {}, {}, {}, sharding.replicated(self.mesh)
        for stage in self.stages:  # rounds of equal stages are one program
            key = id(stage.config), stage.freeze, stage.route
            if key not in made:
                made[key] = program_of(self, stage), sharding.put(knobs_of(stage.config), whole)
            self.programs[stage.name], self.knobs[stage.name] = made[key]
        self._compiled: dict[Program, CompiledStep] = {}
        self._server = None

    def compiled(self, stage) -> CompiledStep:
        program = self.programs[stage.name]
        if program not in self._compiled:
            later = {self.programs[s.name] for s in self.stages if s.start >= stage.start}  # what is over gives way
            kept = {old: step for old, step in self._compiled.items() if old in later}
            self._compiled = kept | {program: compiled_step(self, program)}
        return self._compiled[program]

    def source(self, stage):
        """The rows of a stage; stages of the same tasks read on in the same ones."""
        if stage.tasks not in self._sources:
            self._sources[stage.tasks] = self.regime.source(self.data, self.config, stage)
        return self._sources[stage.tasks]

    def arguments(self, stage) -> tuple:
        """What a stage's step is given beside state, base and rows: frozen models, knobs, what penalties remember."""
        program, knobs = self.programs[stage.name], self.knobs[stage.name]
        if self.regime.side_by_side:
            knobs = sharding.put(self.regime.knobs(jax.device_get(knobs)), sharding.replicated(self.mesh))
        own = self.fixed(program.objective), knobs
        return (*own, self.memory["penalties"]) if program.penalties else own

    def put(self, batch: dict):
        """A turn's rows on the mesh."""
        if self.regime.side_by_side:
            return many.put_stacked(batch, self.mesh)
        return sharding.put_batch(batch, self.mesh, self.config.train.batch_size)

    def server(self, stage, state: TrainState) -> TrainState:
        """The model that a state stands for: itself, or the average of clients."""
        if not self.regime.side_by_side:
            return state
        compiled, sizes = self.compiled(stage), self.source(stage).sizes
        if self._server is None:
            average = lambda s: self.regime.server(s, self.regime.weights(sizes), compiled.frozen)  # noqa: E731
            places = compiled.shardings
            self._server = jax.jit(average, out_shardings=(places.adapters, places.router_state, places.modules))
        adapters, router_state, modules = self._server(state)
        return dataclasses.replace(state, adapters=adapters, router_state=router_state, modules=modules)

    def fixed(self, objective: Objective) -> dict[str, Frozen]:
        """The frozen models that an objective asks for, by its names for them."""
        return {name: self.frozen[source] for name, source in objective.frozen().items()}

    @property
    def looks_back(self) -> bool:
        """Whether an objective asks for the run as it began."""
        return any(START in program.objective.frozen().values() for program in self.programs.values())

    def keep_start(self, start: dict):
        """`start`: adapters, router_state, modules, as the run began; copies, as a step reuses its buffers."""
        self.start = jax.tree.map(jnp.copy, start)
        program = self.programs[self.stages[0].name]
        own = in_place(self.params, self.start["modules"])
        self.frozen[START] = Frozen(own, self.start["adapters"], self.start["router_state"], program.model)

    # ---- state -----------------------------------------------------------------------------------------------------

    def restore_or_start(self) -> TrainState:
        step = self.newest
        stage = self.compiled(stage_at(self.stages, step or 0))
        self.memory = self.regime.memory(self)
        if step is None:
            state = stage.make_start(self.params, self.knobs[self.stages[0].name].seed)
            if self.config.train.init_from:
                shapes = {item: getattr(stage.shapes, item) for item in warm_start.ITEMS}
                warm_start.check_scales(self.config.train.init_from, self.model.rules)
                new = warm_start.start(self.config.train.init_from, shapes, base_digest=self.base.digest)
                put = {item: sharding.put(tree, getattr(stage.shardings, item)) for item, tree in new.items()}
                modules = jax.device_get(state.modules)
                modules = warm_start.modules(self.config.train.init_from, modules, note=self.note)
                state = dataclasses.replace(state, **put, modules=sharding.put(modules, stage.shardings.modules))
            if any(rule.load for rule in self.model.rules):
                new = expert_runs.load_experts(self.model, jax.device_get(state.adapters), self.base.digest)
                state = dataclasses.replace(state, adapters=sharding.put(new, stage.shardings.adapters))
            if self.looks_back:
                self.keep_start({n: getattr(state, n) for n in ("adapters", "router_state", "modules")})
            return stage.spread(state)
        shapes, clients = stage.shapes, bool(self.regime.side_by_side)
        template = {
            "adapters": shapes.adapters,
            "opt": stage.loop_shapes.opt,
            "router_state": shapes.router_state,
            "train": {"step": shapes.step, "skipped": stage.loop_shapes.skipped, "best": np.zeros((), np.float64)},
        }
        if clients:
            template["clients"] = {n: getattr(stage.loop_shapes, n) for n in CLIENTS}
        if self.memory:
            template["memory"] = self.memory
        if shapes.modules:
            template["modules"] = shapes.modules
        if self.looks_back:
            first = self.compiled(self.stages[0]).shapes
            template["start"] = {n: getattr(first, n) for n in ("adapters", "router_state", "modules")}
        items = self.checkpoints.restore(step, template)
        if int(items["train"]["step"]) != step:
            raise InputError(
                str(self.checkpoints.directory / str(step)), got=f"the state of step {int(items['train']['step'])}",
                expected=f"that of step {step}", fix="Delete the step's folder: an older step will be used.",
            )  # fmt: skip
        self.best = self.best_saved = float(items["train"]["best"])
        if self.looks_back:
            self.keep_start(items["start"])
        self.memory = items.get("memory", {})
        self.note(f"resumed at step {step}")
        own = items["clients"] if clients else {name: items.get(name, {}) for name in CLIENTS}
        made = items["train"]["step"]
        if clients:  # a client counts its own steps
            turns = np.full(self.turn, step // self.turn, np.int32)
            made = sharding.put(turns, stage.loop_shardings.step)
        return TrainState(made, items["train"]["skipped"], opt=items["opt"], **own)

    def save(self, state: TrainState, step: int, *, best=False):
        stage = stage_at(self.stages, step)
        whole = self.server(stage, state)
        items = {
            "adapters": whole.adapters,
            "opt": state.opt,
            "router_state": whole.router_state,
            "train": {"step": np.int32(step), "skipped": state.skipped, "best": np.float64(self.best)},
        }
        if whole.modules:
            items["modules"] = whole.modules
        if self.regime.side_by_side:
            items["clients"] = {name: getattr(state, name) for name in CLIENTS}
        if self.memory:
            items["memory"] = self.memory
        if self.looks_back:
            items["start"] = self.start
        meta = {
            "samples": step * self.config.train.batch_size,
            "config": config_lib.to_dict(stage.config),  # the one that these leaves fit
            "identity": self.identity,
            "run": self.workdir.identity,
            "stage": stage.name,
        } | ({"turn": self.turn} if self.turn > 1 else {})  # a row of metrics.jsonl each so many steps
        self.settle()
        self.workdir.check_there()  # a save would make the folder anew
        self.checkpoints.save(step, items, meta=meta, best=best)
        self._best_pending = self.best if best else None

    def settle(self):
        """Waits for the save of a best step: one that the disk refused is not the one to beat."""
        if self._best_pending is not None and jax.process_count() == 1:  # several would not agree on what failed
            self.checkpoints.wait()
            if self.checkpoints.last_save_failed:
                self.best = self.best_saved
            else:
                self.best_saved = self._best_pending
            self._best_pending = None

    def save_patiently(self, state: TrainState, step: int, *, best: float | None = None):
        """A save that waits for the disk; `best` is the held-out NLL of a best step.

        Raises:
          InputError: it could not be written, and waiting does not help (any more).
        """
        self.checkpoints.check()
        self.checkpoints.silent = True  # the first failure is told, then how it ended
        try:
            for wait in (*disk.WAITS, None):
                self.settle()
                self.best = self.best if best is None else best
                self.save(state, step, best=best is not None)
                self.checkpoints.wait()
                if not self.checkpoints.last_save_failed:
                    break
                self.workdir.check_there()
                if wait is None or not self.checkpoints.failures[-1].passing:
                    raise not_saved(step, self.checkpoints.failures)
                time.sleep(wait)
        finally:
            self.checkpoints.silent = False
        if self.checkpoints.failures:
            self.note(f"checkpoint {step}: saved, after {len(self.checkpoints.failures)} failures of the disk")

    def leave(self, stage, state: TrainState) -> tuple[TrainState, dict]:
        """`(state, row)` after a stage's last step: the regime's own work, then the next stage's optimizer state."""
        state, self.memory, row = self.regime.between(self, stage, state, self.memory)
        if self.regime.SCHEDULE and stage is not self.stages[-1]:
            state = self.enter(stage_at(self.stages, stage.stop), state)
        return state, row

    def fresh_moments(self, compiled: CompiledStep, state: TrainState) -> TrainState:
        """A fresh optimizer state; the learning rate is the step's in any case."""
        trainable, _ = trees.split(state.leaves, compiled.frozen)
        return dataclasses.replace(state, opt=compiled.make_opt(trainable))

    def squares(self, stage, state: TrainState, rows: int) -> dict:
        """The mean over `rows` training examples of a stage's tasks of their squared gradients."""
        return mean_squares(self, stage, state, rows)

    def enter(self, stage, state: TrainState) -> TrainState:
        """The next stage's fresh optimizer state, placed as the old one; leaves of other shapes are carried over."""
        compiled = self.compiled(stage)
        if _forms(state) != _forms(compiled.shapes):
            state = self._carried(stage, compiled, state)
        trainable, _ = trees.split(state.leaves, compiled.frozen)
        return dataclasses.replace(state, opt=compiled.make_opt(trainable))

    def _carried(self, stage, compiled, state: TrainState) -> TrainState:
        """What the stage before trained, where a leaf (by absolute layer) still has its shape; others start anew."""
        seed = self.knobs[stage.name].seed
        new = jax.device_get(compiled.make_start(self.params, seed))
        put = {}
        for item in ("adapters", "router_state"):
            tree, anew = warm_start.carried(jax.device_get(getattr(state, item)), getattr(new, item))
            put[item] = sharding.put(tree, getattr(compiled.shardings, item))
            if anew:
                self.note(f"stage {stage.name}: {len(anew)} leaves of {item} start anew: {', '.join(anew[:4])}")
        modules = {path: leaf for path, leaf in flatten_dict(new.modules, sep="/").items()}
        modules |= {k: v for k, v in flatten_dict(jax.device_get(state.modules), sep="/").items() if k in modules}
        modules = sharding.put(unflatten_dict(modules, sep="/"), compiled.shardings.modules)
        return dataclasses.replace(state, **put, modules=modules)

    # ---- evaluation ------------------------------------------------------------------------------------------------

    def valid_nll(self, program: Program, state: TrainState) -> float:
        """Mean over tasks of the NLL per answer token, class or pair on held-out items (split "valid")."""
        examples, sums = self._held_out(program, state)
        tasks = np.array([e.task_id for e in examples])
        each = [sums["nll"][tasks == t].sum() / sums["tokens"][tasks == t].sum() for t in np.unique(tasks)]
        return float(np.mean(each))

    def measured(self, program: Program, state: TrainState, names) -> dict[str, dict]:
        """`{task: accuracy, nll}` on held-out items (split "valid"); names as in `Stream.for_tasks`."""
        examples, sums = self._held_out(program, state)
        tasks, out = np.array([e.task_id for e in examples]), {}
        for name in names:
            own = np.isin(tasks, self.data.train.for_tasks(name).task_ids)
            count = sums["tokens"][own].sum()
            out[name] = dict(accuracy=sums["right"][own].sum() / count, nll=sums["nll"][own].sum() / count)
        return out

    def _held_out(self, program: Program, state: TrainState):
        """`(examples, sums)` as of `example_nll`."""
        model = program.model
        examples = self.data.heldout("valid", self.config.eval.num_items)
        rows = self.config.train.batch_size // self.config.train.accumulate
        targets, forward = self.data.train.targets_per_row, None
        if self.exact:
            rows = rows // MICRO_SHARDS * self.mesh.size  # a micro-shard a device
            forward = ExactNLL(model, mesh=self.mesh, targets_per_row=targets)
        batches = self.data.heldout_batches(examples, rows, targets_per_row=targets)
        sums = example_nll(
            model, self.params, state.adapters, state.router_state, batches, len(examples),
            mesh=self.mesh, targets_per_row=targets, constrain=self.constrain, forward=forward,
            objective=program.objective, modules=state.modules, head=program.head, fixed=self.fixed(program.objective),
        )  # fmt: skip
        return examples, sums


def _forms(state: TrainState) -> dict:
    """`{item/path: (shape, dtype)}` of all leaves but the optimizer's."""
    items = {"adapters": state.adapters, "router_state": state.router_state, "modules": state.modules}
    return {path: (tuple(x.shape), x.dtype) for path, x in flatten_dict(items, sep="/").items()}


def train(config, workdir: str, *, profile: bool = False, note=None) -> Result:
    """Trains, or goes on with, the run in `workdir`.

    Args:
      config: with the fields of `configs/common.py`.
      profile: writes a trace of steps 3 to 5 of this start to `workdir/profile`.
      note: where lines of text go; by default the progress line's own stream.

    Raises:
      InputError: before anything is compiled, for anything that is the user's to change.
    """
    config_lib.validate(config)
    writer = jax.process_index() == 0
    progress = Progress(config.train.steps, log_every=config.train.log_every)
    note = note or (progress.note if writer else lambda text: None)
    with Workdir(workdir, writer=writer) as place, StopRequest() as stop, obstacles(workdir):
        run = Run(place.followed(config, note), place, note=note)
        steps = run.config.train.steps
        if steps != config.train.steps and not config.train.get("epochs", 0.0):
            note(f"train.steps: {config.train.steps} asked for, {steps} made: whole turns of {run.turn} clients")
        progress.steps = last = min(config.train.stop_after or steps, steps)
        state = run.restore_or_start()
        start = run.newest or 0
        stage = stage_at(run.stages, start)
        now, shapes = run.programs[stage.name], run.compiled(stage).shapes
        note(summary.rules_table(now.model, shapes.adapters, now.frozen, trees.count(run.params), shapes.modules))
        note(str(run.table))
        with run.checkpoints:
            if start == 0 and not run.checkpoints.steps():
                run.save(state, 0)  # before the first compile, so that a kill inside it loses nothing
            return _loop(run, state, start, last, stop, progress, note, profile, writer)


def _loop(run, state, start, last, stop, progress, note, profile, writer) -> Result:
    config, began, tokens, loss, skipped = run.config.train, time.monotonic(), 0, None, 0
    metrics = MetricsWriter(run.workdir, after_step=start, every=run.turn, warn=note) if writer else None
    turn = run.turn
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
        number, values, extra = entry
        values = jax.device_get(values)
        values = many.as_one(values) if run.regime.side_by_side else values
        now, before = time.monotonic(), clock
        clock, loss, count = now, float(values["loss"]), int(values["tokens"])
        tokens += count
        if writer:
            metrics.write(row(number, values, now - before) | extra)
        progress.update(number, loss=loss, tokens=count) if writer else None
        skipped = int(values["skipped"])
        if skipped >= MAX_SKIPPED:
            raise not_finite(skipped, number)

    batches, source, stage, best, valid = None, None, None, False, None
    try:
        while step < last and not _stopping(stop, step):
            run.workdir.check_there()
            now = stage_at(run.stages, step)
            if now is not stage:
                stage, compiled = now, run.compiled(now)
                if run.source(stage) is not source:
                    if batches is not None:
                        batches.close()
                    source = run.source(stage)
                    rows = None if run.regime.side_by_side else sharding.rows_of_process(config.batch_size)
                    batches = source.iterate(step // turn, rows=rows)
                more = run.arguments(stage)
            if step == trace[0]:
                tracing = True
                jax.profiler.start_trace(str(pathlib.Path(run.workdir) / "profile"))
            if not compiled.ready:
                note("compiling the step (seconds to a minute, cached for the next start)")
            _, batch = next(batches)
            batch = run.put(batch)
            compiled.compile_together(state, run.params, batch, *more, step=step)
            state, values = compiled.step(state, run.params, batch, *more)
            step = run.step_now = step + turn
            due = lambda every, step=step: bool(every) and step // every > (step - turn) // every  # noqa: E731
            flush(pending)
            pending = (step, values, {})
            if step == trace[1]:
                jax.block_until_ready(values)
                tracing = False
                note(
                    stop_trace(
                        f"trace of steps {start + 2 * turn + 1} to {step}: {pathlib.Path(run.workdir) / 'profile'}"
                    )
                )
            if step >= stage.stop:
                state, extra = run.leave(stage, state)
                pending[2].update(extra)
            best = False
            if due(config.eval_every):
                valid = run.valid_nll(compiled.program, run.server(stage, state))
                run.settle()
                best, run.best = valid < run.best, min(valid, run.best)
                pending[2]["valid_nll"] = valid
                note(f"step {step}: valid NLL {valid:.4f}{' (best)' if best else ''}")
            if best or step >= last or due(config.save_every):
                flush(pending)
                pending = None
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
    run.workdir.check_there()
    if run.checkpoints.last_save_failed or (writer and step not in run.checkpoints.steps()):
        raise not_saved(step, failures)
    result = Result(step, loss, time.monotonic() - began, tokens, peak_bytes(), stop.signal)
    if writer:
        _finish(run, result, start, note)
    if step > start and skipped >= step - start:  # too short to give up on the way
        raise not_finite(skipped, step)
    return result


def not_finite(skipped: int, step: int) -> InputError:
    return InputError(
        "train", got=f"no finite gradient for {skipped} steps in a row (up to step {step})",
        expected="finite gradients",
        fix="Start in another workdir with a lower optim.learning_rate (train.init_from=DIR takes over what this one "
        "learned), or look at the data of these steps; what was trained before is unharmed.",
    )  # fmt: skip


def _stopping(stop: StopRequest, step: int) -> bool:
    """One decision for all processes, asked every tenth step where that costs a collective."""
    if jax.process_count() == 1:
        return stop.requested
    return step % 10 == 0 and bool(np.any(multihost_utils.process_allgather(jnp.int32(stop.requested))))


def row(step: int, values: dict, seconds: float) -> dict:
    """A line of metrics.jsonl: the contract's names, `site/<rule>/<scope>/<statistic>` as lists over layers."""
    values = dict(values)
    sites = values.pop("site")
    flat = {f"site/{name}/{statistic}": v for name, group in sites.items() for statistic, v in group.items()}
    return {"step": step, **values, **flat, "seconds": round(seconds, 4)}


def _finish(run, result: Result, start: int, note):
    try:
        path = plot_loss(run.workdir)
    except (OSError, ValueError, KeyError, TypeError) as error:  # done and saved: a picture is not worth an error
        path = f"not written ({error})"
    done = result.step - start
    rate = result.tokens / result.seconds if done else 0.0
    rows = [
        ("steps", "loss", "tokens/s with compile", "time", "peak memory", "checkpoint"),
        (f"{start} -> {result.step}", "-" if result.loss is None else f"{result.loss:.4f}", f"{rate:,.0f}",
         duration(result.seconds), f"{result.peak_bytes / 1e9:.2f} GB", f"{run.checkpoints.directory}/{result.step}"),
    ]  # fmt: skip
    note(table(rows))
    note(f"loss curve: {path}")
    try:
        told = run.regime.report(run, run.memory)
    except OSError as error:
        told = f"the report of the regime is not written ({error.strerror or error})"
    if told:
        note(told)
    if run.config.train.stop_after and start >= run.config.train.stop_after:
        note(f"nothing to do: the run is at step {start}, train.stop_after is {run.config.train.stop_after}")
    if result.signal is not None:
        note(f"stopped by signal {result.signal} after step {result.step}: the same command goes on from there")
