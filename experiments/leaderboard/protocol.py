"""What is compared on which base: data, budget, grid of learning rates, splits. The README says it in words.

    pkg:smollm2-135m-instruct    the nine tasks of packages, one learning rate for all, a few steps
    sandbox:6m                   ten made tasks (`tasks.py`), a learning rate for each method, a thousand steps

Any other base is treated as the first.
"""

import dataclasses
import pathlib
from collections.abc import Callable

from experiments.leaderboard import tasks
from molora_jax.io import fetch, sandbox

MANY = str(len(tasks.TASKS))  # an expert a task, where the shipped config has one for each of nine
DEFAULT = "pkg:smollm2-135m-instruct"


@dataclasses.dataclass(frozen=True)
class Protocol:
    """`changes(folder)`: fields that all runs of this base have, its data written into the folder.

    rates: the grid, () takes the config's; `grid_changes(folder)`: of the runs that choose a rate: other held-out rows,
    a seed of its own. facts: more of what makes results comparable. own: `{method: {field: text}}`, where a shipped
    config names tasks. left: methods that have no sense there, and why. full: full fine-tuning is one of all methods.
    """

    budget: str
    seeds: int
    items: int
    out: str
    changes: Callable = lambda folder: []
    rates: tuple[float, ...] = ()
    grid_changes: Callable = lambda folder: []
    facts: Callable = dict
    own: dict = dataclasses.field(default_factory=dict)
    left: dict[str, str] = dataclasses.field(default_factory=dict)
    full: bool = False


def _data(folder, split: str) -> list[tuple[str, str]]:
    """A comma inside a path is escaped, as in every entry of `data.tasks`."""
    entry = lambda name: "jsonl:" + str(pathlib.Path(folder) / "tasks" / f"{name}.jsonl").replace(",", r"\,")  # noqa: E731
    return [("data.tasks", entry("train")), ("data.valid", entry(split))]


def _sandbox(folder) -> list[tuple[str, str]]:
    tasks.write(pathlib.Path(folder) / "tasks")
    fixed = {
        "base.source": "sandbox:6m", "data.raw": "True", "data.temperature": "1.0", "data.test_share": "0.0",
        "optim.warmup": "50", "train.remat": "none", "train.log_every": "100",
    }  # fmt: skip
    return [*_data(folder, "test"), *fixed.items()]


REAL = Protocol(budget="40x512", seeds=2, items=16, out="experiments/leaderboard")
SANDBOX = Protocol(
    budget="1000x256",
    seeds=5,
    items=tasks.SIZES["test"],
    out="experiments/leaderboard/sandbox",
    changes=_sandbox,
    rates=(3e-4, 1e-3, 3e-3, 1e-2),
    grid_changes=lambda folder: [*_data(folder, "valid"), ("seed", "1000")],
    facts=lambda: {
        "base": fetch.remembered_sha256(sandbox.folder("6m") / sandbox.WEIGHTS),
        "tasks": tasks.digest(),
        "rates": list(SANDBOX.rates),
    },
    own={
        "loramoe": {"losses.localized_balance.world": "recall"},
        "x_lora": {"method.rules.mix.experts": MANY},
        "lora_mixer": {"method.rules.mix.experts": MANY},
        "meteora": {"method.rules.all.experts": MANY},
    },
    left={
        "stelocoder": "a curriculum over tasks of five languages",
        "mora_cl": "tasks that come one after the other",
        "flexolmo": "owners of data that others do not see",
        "kshot_experts": "experts that are LoRAs of finished runs",
    },
    full=True,
)


def of(base: str) -> Protocol:
    return SANDBOX if base.startswith("sandbox:") else REAL
