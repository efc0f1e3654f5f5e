"""What a page about several runs is made of, read from their folders without a base model, data or a device."""

import contextlib
import dataclasses
import json
import os
import pathlib

import numpy as np

from molora_jax import config as config_lib
from molora_jax.config.resolve import resolve_experts, resolve_layers
from molora_jax.errors import InputError
from molora_jax.io.files import plain
from molora_jax.runs import folders, saved
from molora_jax.runs.metrics_file import is_finite, read_rows


@dataclasses.dataclass(frozen=True)
class Facts:
    """Of one run: `config` (nested dict), `manifest` of its newest step, `rows` of its metrics, `report` of its
    evaluation (None: why not is in `missing`), `beside` the names of the runs that shared its steps."""

    name: str
    folder: pathlib.Path
    config: dict
    manifest: dict
    rows: list
    report: dict | None
    missing: str
    beside: int = 0

    def column(self, *names) -> list[tuple[int, float]]:
        """`(step, value)` of the first of these columns that a row has, finite values only."""
        out = []
        for row in self.rows:
            value = next((row[name] for name in names if name in row), None)
            if is_finite(value):
                out.append((row["step"], float(value)))
        return out

    @property
    def step(self) -> int:
        return self.manifest.get("step", 0)

    @property
    def steps(self) -> int | None:
        return self.config.get("train", {}).get("steps")

    @property
    def state(self) -> str:
        """`40 of 40 steps`, and what ended it before."""
        if not self.rows and not self.step:
            return "made without training" if self.config.get("surgery") else "no step yet"
        patience = self.manifest.get("patience") or {}
        how = ", ended by train.patience" if patience.get("stopped") else ""
        if not how and isinstance(self.steps, int) and self.step < self.steps:
            how = ", not at its end"
        return f"{self.step} of {self.steps} steps{how}"

    @property
    def best(self) -> tuple[float, int] | None:
        """The lowest held-out NLL of the training and its step."""
        return min(((value, step) for step, value in self.column("valid_nll")), default=None)

    @property
    def notes(self) -> list[str]:
        """What went wrong on the way."""
        out = []
        skipped = sum(1 for row in self.rows if is_finite(row.get("skipped")) and row["skipped"] > 0)
        if skipped:
            out.append(f"{skipped} steps without a finite gradient were skipped")
        collapsed = [(row["step"], row["watch/collapsed"]) for row in self.rows if row.get("watch/collapsed")]
        if collapsed:
            most = max(int(number) for _, number in collapsed)
            out.append(f"router collapse from step {collapsed[0][0]} on, in up to {most} layers of routers at a time")
        lost = [row["lost"] for row in self.rows if isinstance(row.get("lost"), str)]
        if lost:
            out.append(f"no metrics of the steps {', '.join(lost)}")
        return out

    def speed(self) -> tuple[float, float] | None:
        """`(seconds a step, tokens a second)`, medians after the first two steps of the file."""
        timed = [r for r in self.rows[2:] if is_finite(r.get("seconds")) and is_finite(r.get("tokens"))]
        rows = [r for r in timed if r["seconds"] > 0]
        if not rows:
            return None
        rate = [row["tokens"] / row["seconds"] for row in rows]
        return float(np.median([row["seconds"] for row in rows])), float(np.median(rate))

    def experts(self, rule: str, layers: int, most: int) -> list[int]:
        """Experts of each layer of a rule, for pictures; `most` in each where the config does not tell."""
        own = (self.config.get("method", {}).get("rules") or {}).get(rule)
        with contextlib.suppress(InputError, LookupError, TypeError, ValueError, AttributeError):
            at = resolve_layers(own["layers"], layers)
            counts = dict(zip(at, resolve_experts(own["experts"], len(at)), strict=True))
            found = [counts.get(layer, 0) for layer in range(layers)]
            if max(found) == most:
                return found
        return [most] * layers


def read(workdirs) -> list[Facts]:
    """The runs of these folders, in order; a folder of runs (of a sweep, of `--runs`) stands for all of them.

    Raises:
      InputError: a folder that is no run, or one that is given twice.
    """
    found: list[pathlib.Path] = []
    for given in workdirs:
        folder = pathlib.Path(given).expanduser()
        inside = [] if folders.is_run(folder) else folders.runs_in(folder)
        found += [folder / name for name in inside] or [folder]
    real = [os.path.realpath(folder) for folder in found]
    twice = next((folder for folder, at in zip(found, real, strict=True) if real.count(at) > 1), None)
    if twice is not None:
        raise InputError("--workdir", got=f"{twice} twice", expected="each run once", fix="Leave one out.")
    return [_facts(folder, name) for folder, name in zip(found, names(found), strict=True)]


def names(paths: list[pathlib.Path]) -> list[str]:
    """The last part of each path, with as many before it as tell the runs apart.

    >>> names([pathlib.Path("a/x/run"), pathlib.Path("a/y/run"), pathlib.Path("b/other")])
    ['x/run', 'y/run', 'other']
    """
    parts = [pathlib.Path(os.path.abspath(path)).parts for path in paths]
    take = [1] * len(parts)
    shown = lambda: ["/".join(own[-n:]) for own, n in zip(parts, take, strict=True)]  # noqa: E731
    for _ in range(max(map(len, parts), default=0)):
        labels = shown()
        take = [n + (labels.count(label) > 1) for n, label in zip(take, labels, strict=True)]
    return shown()


def _facts(folder: pathlib.Path, name: str) -> Facts:
    config = config_lib.to_dict(saved.read_config(folder, "latest", need_base=False))
    report, missing = _report(folder)
    told = folder.parent / folders.GROUP
    rows, beside = read_rows(folder / "metrics.jsonl"), 0
    if rows and not any("time/tokens_per_second_device" in row for row in rows) and told.is_file():
        beside = max(len(folders.runs_in(folder.parent)) - 1, 0)
    return Facts(name, folder, config, saved.manifest_of(folder, "latest") or {}, rows, report, missing, beside)


def _report(folder: pathlib.Path) -> tuple[dict | None, str]:
    path = folder / "report" / "report.json"
    command = f"python -m launch.evaluate --workdir={folder}"
    if not path.exists():
        return None, f"not evaluated: {command}"
    try:
        report = json.loads(plain(path).read_text(encoding="utf-8"))
        tasks, whole = report["tasks"].values(), isinstance(report["step"], int) and _routing(report["routing"])
        if not (tasks and whole and all(_task(task) for task in tasks)):
            raise ValueError("another form")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        return None, f"its report.json cannot be read ({type(error).__name__}: {error}): {command}"
    return report, ""


def _routing(routing) -> bool:
    """Whether it is `{rule: {scope: {task: [L][E]}}}`, the layers of a scope alike in all tasks."""
    for scopes in routing.values():
        for by_task in scopes.values():
            if not by_task or np.asarray(list(by_task.values()), np.float64).ndim != 3:
                return False
    return True


def _task(task) -> bool:
    """Whether an entry of a report has numbers where a page reads them."""
    triple = lambda v: isinstance(v, list) and len(v) == 3 and all(map(is_finite, v))  # noqa: E731
    return (
        is_finite(task["items"])
        and all(triple(task[key]) for key in ("nll",))
        and all(
            task.get(key) is None or triple(task[key])
            for key in ("nll_base", "nll_start", "exact", "exact_base", "accuracy", "accuracy_start")
        )
    )
