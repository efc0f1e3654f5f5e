"""One page about one run or several: losses, tasks with intervals, routing, what differs. It opens from the disk.

python -m launch.report --workdir=runs/a --workdir=runs/b --out=report.html

A folder of runs (of launch.sweep, of --runs) stands for all of them. Neither base model nor data are needed; tasks and
routing by task come from `launch.evaluate --workdir=DIR`, and differences are paired where both runs have seen an item.
"""

from launch import flags
from molora_jax.config.fields import wrong

FLAGS = [
    ("--workdir", dict(required=True, action="append", metavar="DIR", help="the folder of a run, or of runs; again")),
    ("--out", dict(required=True, metavar="FILE.html", help="the page")),
]


def run(argv):
    _, args = flags.parse(__doc__, FLAGS, argv, need_config=False)
    if not args.out.endswith((".html", ".htm")):
        raise wrong("--out", repr(args.out), "a file FILE.html", f"Write --out={args.out}.html.")
    from molora_jax.comparing import facts, page

    runs = facts.read(args.workdir)
    try:
        path = page.write(runs, args.out)
    except OSError as error:
        raise wrong("--out", f"{args.out}: {error.strerror}", "a file that can be written") from None
    print(path)


if __name__ == "__main__":
    flags.main(run)
