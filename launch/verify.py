"""Checks a run's folder: every step against its manifest, and config.json, identity.json, best.json and the metrics.

python -m launch.verify --workdir=runs/quickstart [--json] [--deep]

Needs neither the base model nor the data. Exit status 1 where a step is not valid or a file says what its step does
not.
"""

import json

from launch import flags
from molora_jax.errors import InputError

FLAGS = [
    ("--workdir", dict(required=True, metavar="DIR", help="the folder of a run")),
    ("--json", dict(action="store_true", help="one JSON object in place of the table")),
    ("--deep", dict(action="store_true", help="also load every leaf and compare its digest (imports jax)")),
]


def run(argv):
    _, args = flags.parse(__doc__, FLAGS, argv, need_config=False)
    from molora_jax.runs import remote
    from molora_jax.runs.folders import no_run, runs_in
    from molora_jax.runs.verify import verify

    folder = remote.at_hand(args.workdir)
    if runs_in(folder):
        raise no_run(folder)
    if not any((folder / name).exists() for name in ("config.json", "identity.json", "checkpoints")):
        got = f"{args.workdir!r}, {'without anything that a run writes' if folder.is_dir() else 'which is no folder'}"
        raise InputError("workdir", got=got, expected="the folder of a run", fix="Check the path.")
    found = verify(folder, deep=args.deep)
    shown = json.dumps(found, indent=1) if args.json else text(found)
    print(shown.encode(errors="backslashreplace").decode())  # a strange file name
    return 0 if found["ok"] else 1


def text(found: dict) -> str:
    """A line for each step and file."""
    lines = []
    for step in found["steps"]:
        best = " (best)" if step["step"] == found["best"] else ""
        lines.append(f"step {step['step']}{best}: {'valid' if step['valid'] else 'NOT VALID: ' + step['reason']}")
    lines += [f"PROBLEM: {problem}" for problem in found["problems"]]
    lines += [f"note: {note}" for note in found["notes"]]
    if not found["steps"]:
        lines.append("no step")
    return "\n".join(lines)


if __name__ == "__main__":
    flags.main(run)
