"""Measures data larger than memory: how long a start takes on millions of rows, and its peak memory.

python -m launch.bench_rows --rows=5000000 [--base=random:tiny] [--out=DIR]

Writes a jsonl file of short questions below DIR (a folder of its own that is removed again), then makes the run's data
of it twice, each time in a process of its own: the first tokenises and fills the cache, the second reads it.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

from launch import flags
from molora_jax.config.fields import wrong

FLAGS = [
    ("--rows", dict(type=int, default=5_000_000, metavar="N", help="rows of the file (default: 5,000,000)")),
    ("--base", dict(default="random:tiny", help="the base whose tokenizer is used (default: random:tiny, bytes)")),
    ("--out", dict(metavar="DIR", help="where file and cache are written (default: the system's temporaries)")),
]
MEASURED = """
import json, resource, sys, time
from configs import common
from molora_jax import data, load_base
config = common.get_config()
config.data.update(tasks="jsonl:" + sys.argv[1], seq_len=512)
base = load_base(sys.argv[2], stored=True)
before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, time.monotonic()
made = data.build(config.data, tokenizer=base.tokenizer, batch_size=8, seed=0)
built = time.monotonic() - began
made.heldout("valid", 32), made.report(), made.train.batch(0)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps(dict(seconds=built, to_first_batch=time.monotonic() - began, peak=peak, before=before,
                      examples=made.train.size, ids=int(sum(len(task.ids) for task in made.tasks)))))
"""


def run(argv):
    _, args = flags.parse(__doc__, FLAGS, argv, need_config=False)
    if args.rows < 1:
        raise wrong("--rows", args.rows, "a number from 1 on")
    folder = pathlib.Path(tempfile.mkdtemp(prefix="bench-rows-", dir=args.out))
    try:
        file = folder / "rows.jsonl"
        with open(file, "w") as out:
            for i in range(args.rows):
                out.write(json.dumps(dict(prompt=f"{i} + {i % 97}?", target=str(i + i % 97))) + "\n")
        print(f"{args.rows:,} rows, {file.stat().st_size / 1e6:,.0f} MB")
        env = os.environ | dict(MOLORA_CACHE=str(folder / "cache"), JAX_PLATFORMS="cpu")
        for name in ("first start", "second start"):
            command = [sys.executable, "-c", MEASURED, str(file), args.base]
            done = subprocess.run(command, env=env, check=True, capture_output=True, text=True, cwd=flags.ROOT)
            found = json.loads(done.stdout.splitlines()[-1])
            print(
                f"{name}: {found['seconds']:,.1f} s, {found['to_first_batch']:,.1f} s to the first batch; peak "
                f"{found['peak'] / 1e9:.2f} GB ({found['before'] / 1e9:.2f} before the data); "
                f"{found['examples']:,} training examples, {found['ids']:,} ids",
                flush=True,
            )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    flags.main(run)
