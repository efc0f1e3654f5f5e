"""What the papers of eight routed methods claim, each in a row or two: the small experiments of their specifications.

python -m experiments.routed [--parts=mix,fly,languages,skills] [--steps=100] [--workdir=runs/routed]

`mix`: a small decoder learns three tasks at once, by HydraLoRA, AdaMoLE, LD-MoLE, GOAT, CoMoL and their rivals. `fly`:
FlyLoRA, two linear tasks apart, then the mean of both. `languages`: SteloCoder's gate. `skills`: DeepSeekMoE on a
linear problem. Finished runs are kept. Writes results.json beside this file and prints a table.
"""

import json
import pathlib
import statistics

from experiments.routed import fly, languages, mix, skills
from experiments.words import kept
from launch import flags
from molora_jax.io.files import write_atomically

HERE = pathlib.Path(__file__).parent
FLAGS = [
    ("--parts", dict(default="mix,fly,languages,skills", help="which of them")),
    ("--steps", dict(type=int, default=100, help="optimizer steps of a method in mix")),
    ("--workdir", dict(default="runs/routed", metavar="DIR")),
    ("--out", dict(default=str(HERE), metavar="DIR", help="where results.json is")),
]
PARTS = {"mix": mix, "fly": fly, "languages": languages, "skills": skills}


def main(argv):
    _, args = flags.parse(__doc__, FLAGS, argv, need_config=False)
    from molora_jax import runtime

    runtime.configure()
    workdir, path = pathlib.Path(args.workdir), pathlib.Path(args.out) / "results.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    found = kept(path, steps=args.steps)

    def keep(name, value):
        found["runs"][name] = value
        write_atomically(path, json.dumps(found, indent=1) + "\n")
        print(name, told(value), flush=True)

    for part in args.parts.split(","):
        PARTS[part].run(workdir / part, args.steps, found["runs"], keep)
    for name, value in found["runs"].items():
        print(f"{name:52} {told(value)}")
    return 0


def told(value: dict) -> str:
    """A line of a run's numbers; of several tasks the mean first."""
    parts = []
    for name, number in value.items():
        if isinstance(number, dict):
            each = ", ".join(f"{v:.3f}" for v in number.values())
            parts.append(f"{name} {statistics.mean(number.values()):.4f} ({each})")
        elif number is not None:
            parts.append(f"{name} {number:,.4g}" if isinstance(number, float) else f"{name} {number:,}")
    return ", ".join(parts)


if __name__ == "__main__":
    flags.main(main)
