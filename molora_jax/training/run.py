"""A run as the training loop has it: what `setup` made, the workdir, its stages and their programs, and its state.

restore or start -> the arguments of a step -> save -> the next stage -> held-out items
"""

import dataclasses
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from molora_jax import config as config_lib
from molora_jax import runtime, sharding
from molora_jax.config.fields import MICRO_SHARDS
from molora_jax.core import trees
from molora_jax.errors import InputError
from molora_jax.io import disk
from molora_jax.io.files import write_atomically
from molora_jax.objectives import Frozen, Objective
from molora_jax.objectives.held_out import example_nll
from molora_jax.regimes import base as regimes
from molora_jax.regimes import compile_regime, stage_at, stage_of
from molora_jax.runs import expert_runs, warm_start
from molora_jax.runs import saved as saved_lib
from molora_jax.runs.bases import check_bases
from molora_jax.runs.checkpoints import Checkpoints, read_manifest
from molora_jax.runs.obstacles import not_saved
from molora_jax.runs.same_base import facts_of
from molora_jax.runs.workdir import Workdir
from molora_jax.training import documents, many, probe
from molora_jax.training.exact import ExactNLL
from molora_jax.training.examples import mean_squares
from molora_jax.training.frozen import START, own_reference
from molora_jax.training.patience import Patience
from molora_jax.training.programs import CompiledStep, Program, compiled_step, knobs_of, program_of
from molora_jax.training.setup import setup
from molora_jax.training.step import TrainState

LEARNED = ("adapters", "router_state", "modules")  # items of a state beside its optimizer's


class TrainingRun:
    """The loop's state: what `setup` made, the workdir, and where it stands."""

    def __init__(self, config, workdir: Workdir, *, note, beside: "TrainingRun | None" = None):
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
        self.checkpoints = Checkpoints(
            pathlib.Path(workdir) / "checkpoints", keep=config.train.keep, warn=note, remote=workdir.remote
        )
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
        self.stages = regimes.checked(self.regime.stages(config, self.data), config.train.steps)
        self.turn = self.regime.side_by_side or 1  # optimizer steps that a turn of the loop makes
        self.patience = Patience(config.train.get("patience", 0), (manifest or {}).get("patience"))
        self.memory, self.step_now, self._sources = {}, self.newest or 0, {}
        self.best = self.best_saved = float("inf")
        self._best_pending = None
        self.programs, self.knobs, made, whole = {}, {}, {}, sharding.replicated(self.mesh)
        for stage in self.stages:  # rounds of equal stages are one program
            begins = (
                stage.start if stage.config.optim.get("restart") else 0
            )  # a schedule of its own is another argument
            key = id(stage.config), stage.freeze, stage.route, begins
            if key not in made:
                knobs = knobs_of(stage.config, begins // self.turn)
                made[key] = program_of(self, stage), sharding.put(knobs, whole)
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
        """The rows of a stage; stages of the same rows read on in them."""
        key = stage.tasks, stage.rows
        if key not in self._sources:
            self._sources[key] = self.regime.source(self.data, self.config, stage)
        return self._sources[key]

    def arguments(self, stage) -> tuple:
        """What a stage's step is given beside state, base and rows: frozen models, knobs, what penalties remember."""
        program, knobs = self.programs[stage.name], self.knobs[stage.name]
        if self.regime.side_by_side:
            knobs = sharding.put(self.regime.knobs(jax.device_get(knobs)), sharding.replicated(self.mesh))
        own = self.fixed(program.objective), knobs
        kept = program.penalties and "penalties" in self.memory  # a penalty may remember nothing
        return (*own, self.memory["penalties"]) if kept else own

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
            shardings = compiled.shardings
            self._server = jax.jit(
                average, out_shardings=(shardings.adapters, shardings.router_state, shardings.modules)
            )
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
        self.frozen[START] = own_reference(START, self.params, self.start, program.model)

    # ---- state -----------------------------------------------------------------------------------------------------

    def restore_or_start(self) -> TrainState:
        step = self.newest
        saved = self.stages[0] if step is None else self._saved_in(step)
        stage = self.compiled(saved)
        self.memory = self.regime.memory(self)
        if step is None:
            first, facts = self.stages[0], facts_of(self.base, self.config)
            state = stage.make_start(self.params, self.knobs[first.name].seed)
            if not self.config.train.init_from:  # else every factor is another run's
                state = probe.begin(self, first, state)
            if self.config.train.init_from:
                shapes = {item: getattr(stage.shapes, item) for item in warm_start.ITEMS}
                new = warm_start.start(
                    self.config.train.init_from, shapes, base=facts, rules=self.model.rules, note=self.note
                )
                put = {item: sharding.put(tree, getattr(stage.shardings, item)) for item, tree in new.items()}
                modules = jax.device_get(state.modules)
                modules = warm_start.modules(self.config.train.init_from, modules, note=self.note)
                state = dataclasses.replace(state, **put, modules=sharding.put(modules, stage.shardings.modules))
            if any(rule.load for rule in self.model.rules):
                new = expert_runs.load_experts(self.model, jax.device_get(state.adapters), facts, note=self.note)
                state = dataclasses.replace(state, adapters=sharding.put(new, stage.shardings.adapters))
            if not self.config.train.init_from:
                state = documents.begin(self, first, state)
            if self.looks_back:
                self.keep_start(_learned(state))
            self._remember(self.regime.begin(self, state, self.memory), state)
            return stage.spread(state)
        shapes, clients = stage.shapes, bool(self.regime.side_by_side)
        template = {
            "adapters": shapes.adapters,
            "opt": stage.loop_shapes.opt,
            "router_state": shapes.router_state,
            "train": {"step": shapes.step, "skipped": stage.loop_shapes.skipped, "best": np.zeros((), np.float64)},
        }
        if clients:
            template["clients"] = _learned(stage.loop_shapes)
        if self.memory:
            template["memory"] = self.memory
        if shapes.modules:
            template["modules"] = shapes.modules
        if self.looks_back:
            first = self.compiled(self.stages[0]).shapes
            template["start"] = _learned(first)
        items = self.checkpoints.restore(step, template)
        if int(items["train"]["step"]) != step:
            raise InputError(
                str(self.checkpoints.directory / str(step)), got=f"the state of step {int(items['train']['step'])}",
                expected=f"that of step {step}", fix="Delete the step's folder: an older step will be used.",
            )  # fmt: skip
        check_bases(self.model.rules, items["adapters"], where="workdir", of=f"{self.workdir.path}, step {step}")
        self.best = self.best_saved = float(items["train"]["best"])
        if self.looks_back:
            self.keep_start(items["start"])
        self.memory = items.get("memory", {})
        self.note(f"resumed at step {step}")
        own = items["clients"] if clients else {name: items.get(name, {}) for name in LEARNED}
        made = items["train"]["step"]
        if clients:  # a client counts its own steps
            turns = np.full(self.turn, step // self.turn, np.int32)
            made = sharding.put(turns, stage.loop_shardings.step)
        state = TrainState(made, items["train"]["skipped"], opt=items["opt"], **own)
        following = stage_at(self.stages, step)
        return state if following is saved else self.enter(following, state)

    def _saved_in(self, step: int):
        """The stage whose leaves a saved step has: that which made it (of older versions, that which follows)."""
        name = read_manifest(self.checkpoints.directory / str(step)).get("stage")
        return next((s for s in self.stages if s.name == name), stage_at(self.stages, step))

    def save(self, state: TrainState, step: int, *, best=False):
        stage = stage_of(self.stages, step)
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
            items["clients"] = _learned(state)
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
        meta |= self.patience.record() | {"parameters": self.parameters(stage)}
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
        """`(state, row)` after a stage's last step and the regime's own work, to be evaluated and saved before the next
        stage is entered."""
        state, memory, row = regimes.three(self.regime.between(self, stage, state, self.memory))
        self._remember(memory, state)
        return state, row

    def _remember(self, memory: dict, state: TrainState):
        """Takes a regime's memory. The next step reuses the state's buffers: leaves that are the state's are copied."""
        regimes.remembered(self.memory, memory)
        own = {id(leaf) for leaf in jax.tree.leaves(state)}
        self.memory = jax.tree.map(lambda leaf: jnp.copy(leaf) if id(leaf) in own else leaf, memory)

    def fresh_moments(self, compiled: CompiledStep, state: TrainState) -> TrainState:
        """A fresh optimizer state; the learning rate is the step's in any case."""
        trainable, _ = trees.split(state.leaves, compiled.frozen)
        return dataclasses.replace(state, opt=compiled.make_opt(trainable))

    def squares(self, stage, state: TrainState, rows: int) -> dict:
        """The mean over `rows` training examples of a stage's tasks of their squared gradients."""
        return mean_squares(self, stage, state, rows)

    def enter(self, stage, state: TrainState) -> TrainState:
        """The next stage's fresh optimizer state, placed as the old one; leaves of other shapes are carried over. A
        regime that makes its stages itself says in `between` what goes on."""
        if not self.regime.SCHEDULE:
            return state
        compiled = self.compiled(stage)
        if _forms(state) != _forms(compiled.shapes):
            state = self._carried(stage, compiled, state)
        return self.fresh_moments(compiled, state)

    def _carried(self, stage, compiled, state: TrainState) -> TrainState:
        """What the stage before trained, where a leaf (by absolute layer) still has its shape; others start anew."""
        seed = self.knobs[stage.name].seed
        new = jax.device_get(probe.begin(self, stage, compiled.make_start(self.params, seed)))
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

    def parameters(self, stage) -> dict[str, int]:
        """How many numbers the base has, how many beside it train in a stage, and how many beside it do not."""
        shapes, program = self.compiled(stage).shapes, self.programs[stage.name]
        trained, still = trees.split(trees.joined(shapes.adapters, shapes.modules), program.frozen)
        return {"base": trees.count(self.params), "trained": trees.count(trained), "frozen": trees.count(still)}

    # ---- evaluation ------------------------------------------------------------------------------------------------

    def valid_nll(self, program: Program, state: TrainState) -> float:
        """Mean over tasks of the NLL per answer token, class or pair on held-out items (split "valid")."""
        examples, sums = self._held_out(program, state)
        tasks = np.array([e.task_id for e in examples])
        each = [sums["nll"][tasks == t].sum() / sums["tokens"][tasks == t].sum() for t in np.unique(tasks)]
        return float(np.mean(each))

    def is_best(self, valid: float) -> bool:
        """Takes a held-out NLL, and says whether it is the run's lowest."""
        self.settle()
        best, self.best = valid < self.best, min(valid, self.best)
        return best

    def out_of_patience(self, stage, valid: float) -> dict:
        """Columns of a round's row; `stopped` where it was the last one. Of several stages the last alone may end."""
        if not self.patience.rounds or (self.regime.SCHEDULE and stage is not self.stages[-1]):
            return {}
        over = self.patience.seen(valid)
        return {"patience": self.patience.waited} | ({"stopped": "patience"} if over else {})

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
        runtime.release_memory()
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
        runtime.release_memory()
        return examples, sums


def _learned(state: TrainState) -> dict:
    """`{item: tree}`, of a state or of its shapes."""
    return {name: getattr(state, name) for name in LEARNED}


def _forms(state: TrainState) -> dict:
    """`{item/path: (shape, dtype)}` of all leaves but the optimizer's."""
    return {path: (tuple(x.shape), x.dtype) for path, x in flatten_dict(_learned(state), sep="/").items()}
