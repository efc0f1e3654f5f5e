"""Trains a run, or goes on with it: the same command again resumes.

python -m launch.train --config=configs/mixlora.py --workdir=runs/mixlora [--config.train.steps=N ...] [--profile]

Several runs in one step, a folder each in DIR; they may differ in seed, learning rate, loss weights and data:

python -m launch.train --config=configs/mixlora.py --workdir=runs/grid --runs="optim.learning_rate=1e-4,2e-4;seed=0,1"
"""

import pathlib

from launch import flags
from molora_jax import config as schema
from molora_jax.config import several
from molora_jax.config.fields import wrong

FLAGS = [
    ("--workdir", dict(required=True, metavar="DIR", help="holds everything the run writes")),
    ("--runs", dict(metavar="LISTS", help="FIELD=VALUE,VALUE;FIELD=VALUE,... : a run of each combination")),
    ("--profile", dict(action="store_true", help="also write a trace of three steps to DIR/profile")),
    ("--profiler_port", dict(type=int, metavar="N", help="serve the profiler there while the run goes on")),
]


def run(argv):
    config, args = flags.parse(__doc__, FLAGS, argv)
    configs = None if args.runs is None else together(config, args)
    from molora_jax import runtime

    runtime.configure(several=True)
    from molora_jax.training.group import train_together
    from molora_jax.training.loop import train

    if args.profiler_port is not None:
        runtime.serve_profiler(args.profiler_port)
    with runtime.peers():
        if configs is None:
            result = train(config, args.workdir, profile=args.profile)
        else:
            result = next(iter(train_together(configs, args.workdir).values()))
    return 128 + result.signal if result.signal is not None else 0


def together(config, args) -> dict:
    """`{folder: config}` of `--runs`, each validated."""
    if args.profile:
        raise wrong("--profile", "with --runs", "one of the two", "Profile a run by itself.")
    if any(pathlib.Path(args.workdir, name).exists() for name in ("config.json", "checkpoints")):
        raise wrong("--workdir", f"{args.workdir}, which is a run", "a folder for the runs of --runs", "Name another.")
    out = {}
    for name, changes in several.product(several.lists(args.runs)).items():
        out[name] = flags.override(config, changes)
        schema.validate(out[name])
    return out


if __name__ == "__main__":
    flags.main(run)
