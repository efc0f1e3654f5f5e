"""`results.json`: all that a leaderboard knows, and all that it needs to go on.

    {"setting": {"budget": "40x512", "items": 16, "config": {"optim.learning_rate": "1e-3"}},
     "base": {"nll": {TASK: NATS}, "items": ..., "answer_tokens": ...},
     "runs": [{"key", "method", "changes", "seed", "machine", "nll", "peak_mb", ...}, ...],
     "costs": [{"key", "method", "changes", "ratio": {"median", "min", "max"}, ...}, ...],
     "grid": [{"key", "method", "changes", "losses": {RATE: NATS}, "rate", ...}, ...],
     "failed": {KEY: MESSAGE}}

A run is found again by its key, a hash of everything that makes it this run (method, losses, optimizer, data, seed,
...), so two tables share a run, and a changed config is run anew. The file is replaced as a whole, never half written.
"""

import json
import pathlib

from molora_jax import config as config_lib
from molora_jax.config.resolve import split_commas
from molora_jax.errors import InputError
from molora_jax.io import fetch
from molora_jax.io.files import write_atomically
from molora_jax.runs.manifest import json_hash
from molora_jax.runs.saved import read_object
from molora_jax.runs.workdir import differences, identity

NAME = "results.json"


def key(config) -> str:
    tree, entries = config_lib.to_dict(config), split_commas(config.data.tasks)
    if files := [entry for entry in (*entries, *split_commas(config.data.valid)) if entry.startswith("jsonl:")]:
        entries = [fetch.remembered_sha256(pathlib.Path(entry.removeprefix("jsonl:"))) for entry in files]
        data = json_hash(entries)  # wherever they lie
    else:
        data = config.data.tasks
    return json_hash(identity(tree, dict(base_digest=config.base.source, data_fingerprint=data)))[:16]


class Results:
    def __init__(self, folder, setting: dict):
        """Opens the file of a folder, or starts one.

        Raises:
          InputError: a file of another budget, of other items or fields, or none of ours.
        """
        self.path = pathlib.Path(folder) / NAME
        self.tree = {"setting": setting, "base": None, "runs": [], "costs": [], "grid": [], "failed": {}}
        if not self.path.exists():
            return
        found = read_object(self.path)
        if found:  # files of older versions have no grid
            found.setdefault("grid", [])
        if found.keys() != self.tree.keys():
            expected = f"the fields {', '.join(self.tree)}, as this command writes it"
            raise InputError(str(self.path), got=f"fields {', '.join(found) or '(none)'}", expected=expected)
        changed = differences(found["setting"], setting)
        if changed:
            raise InputError(
                str(self.path), got="results of another setting:\n  " + "\n  ".join(changed) + "\n",
                expected="the same values: rows of different settings do not compare",
                fix="Undo these changes, or write another folder with --out.",
            )  # fmt: skip
        self.tree = found

    def find(self, kind: str, key: str) -> dict | None:
        """A finished entry of `runs`, `costs` or `grid`."""
        return next((entry for entry in self.tree[kind] if entry["key"] == key), None)

    def add(self, kind: str, key: str, entry: dict):
        """Keeps a finished entry (`base`, or one more of `runs`, `costs` or `grid`)."""
        if kind == "base":
            self.tree["base"] = entry
        else:
            self.tree[kind].append({"key": key} | entry)
        self.tree["failed"].pop(f"{kind} {key}", None)
        self.save()

    def fail(self, kind: str, key: str, message: str):
        """Keeps why something failed; the next start tries it again."""
        self.tree["failed"][f"{kind} {key}"] = message
        self.save()

    def save(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, json.dumps(self.tree, indent=1) + "\n")
