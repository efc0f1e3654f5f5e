"""`train.tracker="wandb"`: the numbers of `metrics.jsonl` also go to Weights & Biases (extra `track`).

`WANDB_MODE=offline` writes below the run's folder (`wandb sync` sends it later); `WANDB_PROJECT`, `WANDB_ENTITY`,
`WANDB_API_KEY` and wandb's other variables hold. A start that goes on writes to the same run of wandb, whose id is
in `DIR/tracker.json`; points are placed by `step`, so steps that are done again after a kill lie where they belong.

A tracker never costs a run anything: its calls are made by a thread of its own, rows wait in a bounded queue, and its
first failure is told in one line and ends it.
"""

import json
import os
import pathlib
import queue
import secrets
import threading

from molora_jax.io.files import write_atomically
from molora_jax.runs.metrics import scalars

WAITING = 10_000  # rows; more are dropped, and counted
SECONDS = 30.0  # at the end, for what still waits
ID = "tracker.json"


class NoTracker:
    def log(self, row: dict):
        """Takes a row of metrics."""

    def close(self):
        """Sends what waits."""


class Wandb(NoTracker):
    """`workdir`: of the run; `config`: a nested dict; `note`: called with a line of text where it fails."""

    def __init__(self, workdir, config: dict, note):
        self.folder, self.config, self.note = pathlib.Path(workdir), config, note
        self._rows, self._failed, self._dropped = queue.Queue(WAITING), False, 0
        self._thread = threading.Thread(target=self._work, name="tracker", daemon=True)
        self._thread.start()

    def log(self, row):
        if self._failed:
            return
        try:
            self._rows.put_nowait(dict(row))
        except queue.Full:
            self._dropped += 1

    def close(self):
        if not self._failed:
            try:
                self._rows.put(None, timeout=SECONDS)
            except queue.Full:
                self._dropped += 1
        self._thread.join(SECONDS)
        if self._thread.is_alive():
            self.note(
                f"wandb has not answered within {SECONDS:.0f} s: what it has not sent stays below {self.folder}/wandb"
            )
        elif self._dropped:
            self.note(f"wandb was too slow: {self._dropped} rows are in metrics.jsonl alone")

    def _work(self):
        try:
            run = self._begin()
            while (row := self._rows.get()) is not None:
                run.log(scalars(row) | {"step": row["step"]})
            run.finish()
        except BaseException as error:  # wandb raises its own kinds, and SystemExit where nobody is logged in
            self._failed = True
            text = (str(error).splitlines() or [""])[0]
            hint = "; pip install 'molora_jax[track]'" if isinstance(error, ImportError) else ""
            self.note(
                f"wandb: {type(error).__name__}: {text}: the run goes on without it (metrics.jsonl has all{hint})"
            )

    def _begin(self):
        import wandb

        settings = wandb.Settings(console="off", silent=True, login_timeout=30, init_timeout=60)
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "molora_jax"), id=run_id(self.folder), resume="allow",
            name=self.folder.name, dir=str(self.folder), config=self.config, settings=settings,
        )  # fmt: skip
        run.define_metric("*", step_metric="step")
        return run


def run_id(folder) -> str:
    """The id that the run has at wandb, made at its first start."""
    path = pathlib.Path(folder) / ID
    try:
        told = json.loads(path.read_text(encoding="utf-8"))["wandb"]
        if isinstance(told, str) and told.isalnum() and len(told) <= 64:
            return told
    except (OSError, ValueError, LookupError, TypeError):
        pass
    new = secrets.token_hex(6)
    write_atomically(path, json.dumps({"wandb": new}) + "\n")
    return new


def tracker(config, workdir, *, as_dict: dict, note) -> NoTracker:
    """Of a config: the one that `train.tracker` names."""
    name = config.train.get("tracker", "")
    return {"": lambda: NoTracker(), "wandb": lambda: Wandb(workdir, as_dict, note)}[name]()
