"""A sweep: a run for each setting and seed, as few compiled steps as may be, a table, a picture, `sweep.json`.

    OUT/NAME/        an ordinary run of `launch.train`
    OUT/sweep.json   {"settings": [{"name", "changes", "nll", "runs": [{"workdir", "seed", "state", ...}]}], "best"}
    OUT/sweep.png, sweep.pdf, losses.png, losses.pdf

Runs whose configs differ in nothing that a step is compiled from go side by side in one step (`training.group`); others
go one after the other, and the reason is said. What is done is read from the runs' own folders, never remembered: the
same sweep started again goes on where it was killed. A run that fails is told and the next ones go on.

The value of a run is its lowest held-out NLL (split valid), which is that of its best step.
"""

import dataclasses
import json
import pathlib
import re
import traceback
from typing import Any

from molora_jax import config as config_lib
from molora_jax.comparing import seeds as statistics
from molora_jax.config import several
from molora_jax.config.fields import wrong
from molora_jax.errors import InputError
from molora_jax.io.files import write_atomically
from molora_jax.pictures import TUNED, figure, plain, save, say
from molora_jax.runs import folders, identity, saved
from molora_jax.runs.metrics_file import MAX_SKIPPED, is_finite, read_rows
from molora_jax.text import table

FILE = "sweep.json"
DONE, FAILED, BEGUN, NONE = "done", "failed", "begun", "not begun"


@dataclasses.dataclass(frozen=True)
class Member:
    """A run of the sweep: `name` is its folder's, `setting` that of its setting, `config` is validated."""

    name: str
    setting: str
    seed: int
    config: Any


@dataclasses.dataclass(frozen=True)
class Stand:
    """How far a member is: one of `DONE`, `FAILED`, `BEGUN`, `NONE`; its step; its value and the step that has it."""

    state: str
    step: int | None = None
    value: float | None = None
    best_step: int | None = None
    error: str = ""
    stopped: str = ""


class Sweep:
    """`members` in order; `settings`: `{name: {field: value}}` of the grid; `together`: most runs of one step."""

    def __init__(self, members: list[Member], settings: dict[str, dict], out, *, together: int, note):
        self.members, self.settings, self.out = members, settings, pathlib.Path(out).expanduser()
        self.together, self.note, self.errors, self._told = together, note, {}, set()

    # ---- what is there -------------------------------------------------------------------------------------------

    def stand(self, member: Member) -> Stand:
        """Read from the run's folder, without jax."""
        folder = self.out / member.name
        error = self.errors.get(member.name, "")
        manifest = saved.manifest_of(folder, "latest")
        if manifest is None:
            return Stand(FAILED if error else NONE, error=error)
        rows = read_rows(folder / "metrics.jsonl")
        step, waited = manifest["step"], (manifest.get("patience") or {}).get("waited", 0)
        stopped = 0 < member.config.train.get("patience", 0) <= waited
        rounds = [(r["valid_nll"], r["step"]) for r in rows if is_finite(r.get("valid_nll")) and r["step"] <= step]
        value, best_step = min(rounds, default=(None, None))
        over = stopped or step >= target(member.config, manifest)
        skipped = rows[-1].get("skipped", 0) if rows else 0
        if over and not error and (skipped >= min(MAX_SKIPPED, max(step, 1)) or value is None):
            error = f"no finite gradient for {skipped} steps in a row" if skipped else "no held-out NLL that is finite"
        state = FAILED if error else DONE if over else BEGUN
        return Stand(state, step, value, best_step, error, "patience" if stopped else "")

    def check(self):
        """Refuses a folder whose runs are others than those of this sweep, before anything is trained."""
        if (self.out / "config.json").exists() or (self.out.exists() and not self.out.is_dir()):
            what = "a file" if self.out.is_file() else "the folder of a run"
            raise wrong("--out", f"{str(self.out)!r}, {what}", "a folder for the runs of the sweep", "Name another.")
        for member in self.members:
            manifest = saved.manifest_of(self.out / member.name, "latest")
            before = (manifest or {}).get("config")
            if isinstance(before, dict):
                new = saved.as_in_stage(config_lib.to_dict(member.config), before, manifest.get("stage"))
                old, new = identity.of_config(before), identity.of_config(new)
                changed, _ = identity.compare(old, new)
                settled = "train.steps" if member.config.train.get("epochs", 0.0) else None
                changed = [line for line in changed if settled is None or not line.startswith(settled)]
                if changed:
                    raise identity.another_run(f"--out, {self.out / member.name}", changed)

    # ---- what is to do -------------------------------------------------------------------------------------------

    def units(self) -> list[list[Member]]:
        """The members that are not done, in groups that share a step, in order of their first one."""
        classes: dict[tuple, list[Member]] = {}
        for member in self.members:
            stand = self.stand(member)
            if stand.state in (BEGUN, NONE):
                key = (form(member.config), stand.state == NONE)
                classes.setdefault(key, []).append(member)
        out = []
        for alike in classes.values():
            reason = self._alone(alike[0].config) if len(alike) > 1 else ""
            if reason:
                self._say_once(f"one after the other, {len(alike)} runs of equal shapes: {reason}")
            size = 1 if reason else self.together
            out += [alike[at : at + size] for at in range(0, len(alike), size)]
        if len(classes) > 1 and len({form(member.config) for unit in out for member in unit}) > 1:
            self._say_once(f"{len(out)} steps are compiled: {_why_apart([m.config for unit in out for m in unit])}")
        return out

    def _alone(self, config) -> str:
        from molora_jax.training.group import unfit

        error = unfit(config)
        if error is not None:
            return f"{error.got}; side by side it has to be {error.expected}"
        return "--together=1" if self.together == 1 else ""

    def _say_once(self, text):
        if text not in self._told:
            self._told.add(text)
            self.note(text)

    def perform(self) -> int | None:
        """Trains what is not done. Returns the signal that stopped it, None where it went to its end."""
        units = self.units()
        count = sum(map(len, units))
        self.note(f"{len(self.members)} runs of {len(self.settings)} settings in {self.out}: {count} to train")
        if units:
            self._try_out({member.setting: member for unit in units for member in unit}.values())
        for number, unit in enumerate(units, 1):
            self.note(f"[{number}/{len(units)}] {', '.join(member.name for member in unit)}")
            signal = self._together(unit) if len(unit) > 1 else self._alone_run(unit[0], quiet=number > 1)
            self.write()
            if signal is not None:
                return signal
        return None

    def _try_out(self, members):
        """Base, data and model of each, without compiling: what does not fit is said before anything is trained."""
        from molora_jax.training.setup import setup

        first: dict[tuple, Any] = {}
        for member in members:
            base = member.config.base
            key = (base.source, base.dtype, json.dumps(config_lib.to_dict(member.config)["mesh"], sort_keys=True))
            try:
                made = setup(member.config, beside=first.get(key))
            except InputError as error:
                raise error.inside(f"--grid, {member.name}") from None
            first.setdefault(key, made)

    def _together(self, unit) -> int | None:
        from molora_jax.training.group import train_together

        try:
            results = train_together({member.name: member.config for member in unit}, self.out, note=self.note)
            return next(iter(results.values())).signal
        except Exception as error:  # of the device's memory, say: alone a run needs less
            reason, signal = _told(error), getattr(error, "asked_to_stop", None)
        if signal is not None:
            self.note(reason)
            return signal
        left = [member for member in unit if self.stand(member).state in (BEGUN, NONE)]
        if left:
            self.note(f"one after the other, {len(left)} runs: {reason}")
        for member in left:
            signal = self._alone_run(member, quiet=True)
            if signal is not None:
                return signal
        return None

    def _alone_run(self, member, *, quiet: bool) -> int | None:
        from molora_jax.training.loop import train

        note = (lambda text: None if "\n" in text else self.note(f"{member.name}: {text}")) if quiet else self.note
        try:
            return train(member.config, str(self.out / member.name), note=note).signal
        except Exception as error:
            if not isinstance(error, InputError):
                traceback.print_exc()
            self.errors[member.name], signal = _told(error), getattr(error, "asked_to_stop", None)
        others = "go on" if signal is None else "wait for the next start"
        self.note(f"{member.name} FAILED, the others {others}: {self.errors[member.name]}")
        return signal

    # ---- what came out -------------------------------------------------------------------------------------------

    def found(self) -> dict:
        """The content of `sweep.json`."""
        settings, values = [], {}
        for name, changes in self.settings.items():
            runs = []
            for member in self.members:
                if member.setting == name:
                    stand = dataclasses.asdict(self.stand(member))
                    runs.append({"workdir": member.name, "seed": member.seed, **stand})
            own = values[name] = {run["seed"]: run["value"] for run in runs if run["state"] == DONE}
            told = statistics.interval(list(own.values())) if own else None
            settings.append({"name": name, "changes": changes, "nll": told, "runs": runs})
        best = statistics.best(values)
        return {
            "value": "valid_nll, the lowest of a run",
            "settings": settings,
            "best": None if best is None else dataclasses.asdict(best),
        }

    def write(self) -> tuple[dict, list[str]]:
        """`sweep.json`, and the names of the runs that are there."""
        found = self.found()
        self.out.mkdir(parents=True, exist_ok=True)
        write_atomically(self.out / FILE, json.dumps(found, indent=1) + "\n")
        there = [member.name for member in self.members if folders.is_run(self.out / member.name)]
        if there:
            write_atomically(self.out / folders.GROUP, json.dumps({"runs": there}, indent=1) + "\n")
        return found, there

    def finish(self) -> tuple[dict, list[pathlib.Path]]:
        """`(sweep.json, pictures)`."""
        from molora_jax.training.loss_picture import plot_losses

        found, there = self.write()
        return found, [plot(found, self.out / "sweep.png"), *([plot_losses(self.out, there)] if there else [])]


def target(config, manifest: dict) -> int:
    """The step at which a run is done; where the data or the regime settle it, the one that they have settled."""
    settled = config.train.get("epochs", 0.0) or config.get("regime", {}).get("name", "stages") != "stages"
    steps = manifest["config"]["train"]["steps"] if settled else config.train.steps
    return min(config.train.stop_after or steps, steps)


def form(config) -> str:
    """What a step is compiled from: two configs of one form may differ in what `--runs` lets differ."""
    flat = identity.flat(config_lib.to_dict(config))
    kept = {path: value for path, value in flat.items() if not re.fullmatch(several.MAY_DIFFER, path)}
    return json.dumps(kept, sort_keys=True)


def _why_apart(configs) -> str:
    """`method.rules.all.adapter.rank differs (it says what trains and of which shape)`."""
    flats = [json.loads(form(config)) for config in configs]
    paths = sorted({path for flat in flats for path in flat})
    differ = [p for p in paths if len({json.dumps(flat.get(p)) for flat in flats}) > 1]
    reason = next((why for pattern, why in several.REASONS if re.match(pattern, differ[0])), "") if differ else ""
    return f"{', '.join(differ[:4])} differ{'s' if len(differ) == 1 else ''} ({reason})"


def text_table(found: dict) -> str:
    """One row a setting, the best marked, and how sure that is."""
    best = found["best"]
    rows = [("", "setting", "runs", "valid NLL", "95 % over seeds", "by seed")]
    for one in found["settings"]:
        done = [run for run in one["runs"] if run["state"] == DONE]
        mean, low, high = one["nll"] or (None, None, None)
        rows.append((
            "*" if best and best["name"] == one["name"] else "", one["name"], f"{len(done)} of {len(one['runs'])}",
            "-" if mean is None else f"{mean:.4f}", "-" if low is None else f"{low:.4f} - {high:.4f}",
            " ".join(f"{run['value']:.4f}" if run["state"] == DONE else run["state"] for run in one["runs"]),
        ))  # fmt: skip
    return "\n".join([table(rows, right=(3,)), sentence(found)])


def sentence(found: dict) -> str:
    """Which setting is best, and how sure that is."""
    best = found["best"]
    if best is None:
        return "no run has come to an end"
    if best["rival"] is None:
        return f"* {best['name']}: the only setting with a run that is done"
    if best["sure"] is None:
        return f"* lowest is {best['name']}; how sure that is needs two seeds of each setting (--seeds=3)"
    value, low, high = best["difference"]
    told = f"{value:+.4f} ({low:+.4f} to {high:+.4f}) against {best['rival']}"
    if best["sure"] < 0.9:
        return f"* lowest is {best['name']}, {told}: {best['sure']:.0%} sure, so not told apart (try more seeds)"
    return f"* best is {best['name']}, {told}: at least {min(best['sure'], 0.999):.1%} sure (paired by seed)"


def plot(found: dict, path) -> pathlib.Path:
    """Every run a dot, every setting its mean and interval; the best in colour."""
    settings, best = found["settings"], (found["best"] or {}).get("name")
    fig, ax = figure(figsize=(7.5, 1.3 + 0.42 * len(settings)), layout="constrained")
    drawn = False
    for at, one in enumerate(settings):
        color = TUNED if one["name"] == best else "#5c6670"
        values = [run["value"] for run in one["runs"] if run["state"] == DONE]
        ax.plot(values, [at] * len(values), "o", color=color, alpha=0.35, ms=5, mec="none")
        if one["nll"]:
            mean, low, high = one["nll"]
            bars = None if low is None else [[mean - low], [high - mean]]
            ax.errorbar([mean], [at], xerr=bars, fmt="D", color=color, ms=6, capsize=3, lw=1.5)
            drawn = True
    ax.set_yticks(range(len(settings)), [plain(one["name"]) for one in settings])
    ax.set(xlabel="held-out NLL (nats a token; lower is better): runs, mean and 95 % over seeds")
    ax.set_ylim(len(settings) - 0.5, -0.5)
    ax.grid(axis="x", alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    if not drawn:
        say(ax, "no run has come to an end")
    return save(fig, path)


def _told(error) -> str:
    if isinstance(error, InputError):
        return str(error)
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:400]
