"""Makes one run of finished ones: merges adapters, or puts them into the base.

python -m launch.surgery --config=configs/lora_lego.py --workdir=runs/merged --config.surgery.inputs=runs/a,runs/b@200

An input is the folder of a run (its best step, else its newest) or DIR@step. The new run is an ordinary one: evaluate,
generate, load_run, a warm start (--config.train.init_from=runs/merged) and surgery open it.
"""

import sys

from launch import flags

FLAGS = [("--workdir", dict(required=True, metavar="DIR", help="of the new run: not there yet, or empty"))]


def run(argv):
    config, args = flags.parse(__doc__, FLAGS, argv, need_rules=False)
    from molora_jax import runtime

    runtime.configure()
    from molora_jax.surgery.perform import perform

    print(perform(config, args.workdir, note=lambda text: print(text, file=sys.stderr, flush=True)))


if __name__ == "__main__":
    flags.main(run)
