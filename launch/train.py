"""Trains a run, or goes on with it: the same command again resumes.

python -m launch.train --config=configs/mixlora.py --workdir=runs/mixlora [--config.train.steps=N ...] [--profile]
"""

from launch import flags

FLAGS = [
    ("--workdir", dict(required=True, metavar="DIR", help="holds everything the run writes")),
    ("--profile", dict(action="store_true", help="also write a trace of three steps to DIR/profile")),
]


def run(argv):
    config, args = flags.parse(__doc__, FLAGS, argv)
    from molora_jax import runtime

    runtime.configure()
    from molora_jax.training.loop import train

    with runtime.peers():
        result = train(config, args.workdir, profile=args.profile)
    return 128 + result.signal if result.signal is not None else 0


if __name__ == "__main__":
    flags.main(run)
