"""`continual`: tasks one after the other; what each costs the ones before is measured on held-out rows.

    a_ij   accuracy on task j after task i (i, j = 1 .. T)
    backward transfer   1/(T-1) sum_{i<T} (a_Ti - a_ii)                    (Lopez-Paz & Ranzato 2017, arXiv 1706.08840)
    forgetting          1/(T-1) sum_{j<T} (max_{l<T} a_lj - a_Tj)          (Chaudhry et al. 2018, arXiv 1801.10112)

Accuracy is the objective's own on held-out items (split valid, `eval.num_items` a task): the share of answer tokens
whose target is the likeliest (`lm`, `distill`), of texts given their class (`classify`), of pairs in the right order
(`preference`). What is carried from task to task is the memory: `replay` rows of each earlier task, drawn
`replay_share` of the time, and what the penalties of `losses` remember (`losses/ewc.py`). Optimizer moments begin anew
with a task; the learning rate's schedule runs over the whole run. Routers are told when another task begins
(`Router.next_task`: a bank opens its experts, others do nothing), after the task before was measured. T tasks.
"""

import dataclasses
import json
import pathlib
from typing import ClassVar

import jax
import numpy as np

from molora_jax.config.resolve import split_commas
from molora_jax.data.example import seed_of, shuffled
from molora_jax.errors import InputError
from molora_jax.io.files import write_atomically
from molora_jax.pictures import figure, save, shades
from molora_jax.regimes.base import Regime, one_stage
from molora_jax.text import table

MEASURE = {
    "text": "share of held-out answer tokens whose target is the likeliest token",
    "label": "share of held-out texts that are given their class",
    "pair": "share of held-out pairs whose chosen answer is preferred (a draw is 1/2)",
}


@dataclasses.dataclass(frozen=True)
class Continual(Regime):
    """`order`: the tasks (names, or entries of `data.tasks`), "" as they stand there. `fisher_rows`: training rows of a
    task whose squared gradients a penalty is given."""

    HELD_OUT: ClassVar[bool] = True
    PENALTY: ClassVar[bool] = True
    SQUARES: ClassVar[bool] = True

    order: str = ""
    replay: int = 0
    replay_share: float = 0.25
    fisher_rows: int = 64

    LIMITS: ClassVar = {"replay": (0, None), "replay_share": (0.0, 0.9), "fisher_rows": (1, 100_000)}

    def tasks(self, config, data) -> tuple[str, ...]:
        (stage,) = config.schedule.values()
        return split_commas(self.order or stage.tasks) or data.task_names[: data.num_trained]

    def check(self, config, data, model):
        names = self.tasks(config, data)
        if len(set(names)) != len(names):
            raise InputError("regime.order", got=repr(self.order), expected="every task once")
        for name in names:
            data.train.for_tasks(name)  # raises for an unknown one
            if not data.heldout_of(name, "valid", 1):
                raise InputError(
                    "data.test_share", got=f"no held-out row of task {name!r}", expected="at least one of every task",
                    fix="Give the task more rows, or raise data.test_share.",
                )  # fmt: skip

        for rule in model.rules:
            rooms = [rule.router.room(E) for E in rule.experts if E] if rule.router is not None else []
            least = min((room for room in rooms if room is not None), default=len(names))
            if least < len(names):
                raise InputError(
                    f"method.rules.{rule.name}.experts", got=f"room for {least} tasks, one after the other",
                    expected=f"for {len(names)}: {', '.join(names)}", fix="Raise experts, or lower router.per_task.",
                )  # fmt: skip

    def stages(self, config, data):
        names, out, start = self.tasks(config, data), [], 0
        for i, name in enumerate(names):
            stop = start + (config.train.steps - start) // (len(names) - i)
            out.append(one_stage(config, f"t{i:02d}", start, stop, name))
            start = stop
        return tuple(stage for stage in out if stage.stop > stage.start)

    def source(self, data, config, stage):
        own, names = data.train.for_tasks(stage.tasks), self.tasks(config, data)
        earlier = names[: names.index(stage.tasks)]
        if not self.replay or not earlier:
            return own
        members = {i: own.members(i) for i in own.task_ids}
        kept = {}
        for name in earlier:
            stream = data.train.for_tasks(name)
            for i in stream.task_ids:
                rows = stream.members(i)
                chosen = shuffled(seed_of("replay", config.seed, i), len(rows))[: self.replay]
                kept[i] = rows[np.sort(chosen)]
        new = {i: fraction * (1 - self.replay_share) for i, fraction in own.fractions.items()}
        fractions = new | {i: self.replay_share / len(kept) for i in kept}
        return data.train.among(members | kept, fractions=fractions)

    # ---- memory ----------------------------------------------------------------------------------------------------

    def memory(self, run):
        T = len(self.tasks(run.config, run.data))
        compiled = run.compiled(run.stages[0])
        none = np.full((T, T), np.nan)
        penalties = {name: compiled.fresh_memory(loss) for name, loss in compiled.program.penalties}
        return {"accuracy": none, "nll": none.copy(), "penalties": penalties}

    def between(self, run, stage, state, memory):
        names, compiled = self.tasks(run.config, run.data), run.compiled(stage)
        i = names.index(stage.tasks)
        found = run.measured(compiled.program, state, names)
        memory = {**memory, **{n: memory[n].copy() for n in ("accuracy", "nll")}}
        for j, name in enumerate(names):
            memory["accuracy"][i, j], memory["nll"][i, j] = found[name]["accuracy"], found[name]["nll"]
        if compiled.program.penalties and i + 1 < len(names):
            read = any(loss.SQUARES for _, loss in compiled.program.penalties)
            squares = run.squares(stage, state, self.fisher_rows) if read else {}
            memory["penalties"] = {
                name: compiled.remembered(loss, memory["penalties"][name], state, squares)
                for name, loss in compiled.program.penalties
            }
        row = {f"task_accuracy/{name}": float(memory["accuracy"][i, j]) for j, name in enumerate(names)}
        self._write(run, memory)
        if i + 1 < len(names):
            state = dataclasses.replace(state, router_state=next_task(compiled.program.model, state.router_state))
        return run.fresh_moments(compiled, state), memory, row

    # ---- report ----------------------------------------------------------------------------------------------------

    def summary(self, run, memory) -> dict:
        names = list(self.tasks(run.config, run.data))
        a, rows = memory["accuracy"], run.data.options.reads
        left = [name for name in names if name not in {stage.tasks for stage in run.stages}]
        return {
            "tasks": names,
            "metric": MEASURE[rows],
            "items": {name: len(run.data.heldout_of(name, "valid", run.config.eval.num_items)) for name in names},
            "accuracy": _plain(a),
            "nll": _plain(memory["nll"]),
            "backward_transfer": backward_transfer(a),
            "forgetting": forgetting(a),
            "average_accuracy": _number(np.mean(a[-1])),
            "without_steps": left,
        }

    def _write(self, run, memory):
        if run.workdir.writer:
            path = pathlib.Path(run.workdir) / "report" / "continual.json"
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, json.dumps(self.summary(run, memory), indent=1) + "\n")

    def report(self, run, memory):
        found, folder = self.summary(run, memory), pathlib.Path(run.workdir) / "report"
        self._write(run, memory)
        picture(found, folder / "continual.png")
        head = ("accuracy after", *found["tasks"])
        cell = lambda x: "-" if x is None else f"{100 * x:.1f} %"  # noqa: E731
        rows = [(name, *map(cell, row)) for name, row in zip(found["tasks"], found["accuracy"], strict=True)]
        text = table([head, *rows])
        if found["backward_transfer"] is not None:
            text += (
                f"\nbackward transfer {100 * found['backward_transfer']:+.1f} points, forgetting "
                f"{100 * found['forgetting']:.1f} points ({folder / 'continual.json'})"
            )
        if found["without_steps"]:
            text += f"\ntrain.steps={run.config.train.steps} leaves no step for {', '.join(found['without_steps'])}"
        return text


def next_task(model, router_state: dict) -> dict:
    """The state of all routers as another task begins; layers side by side."""
    new = {}
    for rule in model.rules:
        for segment, own in router_state.get(rule.name, {}).items():
            begun = {scope: jax.vmap(rule.router.next_task)(old) for scope, old in own["router"].items()}
            new.setdefault(rule.name, {})[segment] = {"router": begun}
    return new


def backward_transfer(a) -> float | None:
    """Of the matrix `[after task, task]`; None before the last task's end, or for one task."""
    T = len(a)
    return _number(np.mean(a[-1, :-1] - np.diag(a)[:-1])) if T > 1 else None


def forgetting(a) -> float | None:
    T = len(a)
    return _number(np.mean(np.max(a[:-1, :-1], axis=0) - a[-1, :-1])) if T > 1 else None


def _number(x) -> float | None:
    return None if np.isnan(x) else float(x)


def _plain(matrix) -> list:
    return [[_number(x) for x in row] for row in matrix]


def picture(found: dict, path):
    """Left the matrix, right each task's accuracy over the tasks."""
    names, a = found["tasks"], np.array(found["accuracy"], float)
    T = len(names)
    fig, (left, right) = figure(1, 2, figsize=(5.5 + 1.1 * T, 1.8 + 0.6 * T), layout="constrained")
    image = left.imshow(100 * a, vmin=0, vmax=100, cmap="viridis", aspect="auto")
    for i, j in np.ndindex(T, T):
        if not np.isnan(a[i, j]):
            colour = "black" if a[i, j] > 0.6 else "white"
            left.text(j, i, f"{100 * a[i, j]:.0f}", ha="center", va="center", color=colour, fontsize=9)
    left.set(xticks=range(T), yticks=range(T), xlabel="measured on", ylabel="after training on")
    left.set_xticklabels(names, rotation=30, ha="right")
    left.set_yticklabels(names)
    fig.colorbar(image, ax=left, label="accuracy (%)")
    for j, (name, colour) in enumerate(zip(names, shades(T), strict=True)):
        right.plot(range(T), 100 * a[:, j], color=colour, lw=1.2)
        right.plot(range(j, T), 100 * a[j:, j], "o-", color=colour, lw=2.2, label=name)
    right.set(xticks=range(T), xlabel="after training on", ylabel="accuracy (%)", ylim=(0, 100))
    right.set_xticklabels(names, rotation=30, ha="right")
    right.grid(alpha=0.3)
    right.legend(frameon=False, fontsize=8)
    return save(fig, path)
