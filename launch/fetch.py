"""Brings what a run needs to this machine, before the job that needs it: model, adapters, runs and tokenised rows.

python -m launch.fetch --config=configs/mixlora.py [--config.base.source=...] [--config.data.tasks=...]

Everything lands below MOLORA_CACHE (~/.cache/molora_jax), where the run finds it: packages, models of the hub, what
lies on an object store (gs://, s3://), converted GGUF files, the digests of weights, and the rows as token ids. Run it
on each machine, or once where all of them share that folder. It starts no training and takes no accelerator.
"""

import os
import time

from launch import flags

FLAGS = []


def run(argv):
    config, _ = flags.parse(__doc__, FLAGS, argv)
    os.environ["JAX_PLATFORMS"] = "cpu"
    from molora_jax import runtime

    runtime.configure()
    from molora_jax.training.fetch import fetch

    began = time.monotonic()
    for line in fetch(config):
        print(line, flush=True)
    print(f"all is here ({time.monotonic() - began:.0f} s)")


if __name__ == "__main__":
    flags.main(run)
