"""Evaluates a run on held-out items, before (the base model) and after training: a table, report.json and pictures.

python -m launch.evaluate --workdir=runs/quickstart [--step=best|latest|N] [--mesh=fsdp:8]
    [--config.eval.num_items=32 ...]
"""

import sys

from launch import flags
from molora_jax.errors import InputError

FLAGS = [
    ("--workdir", dict(required=True, metavar="DIR", help="the folder of a run")),
    ("--step", dict(default="best", help="best, latest or a number (default: best)")),
    flags.MESH,
]


def saved_config(args):
    from molora_jax.runs.saved import parse_step, read_config, without_inputs

    return without_inputs(read_config(args.workdir, parse_step(args.step)), keep_data=True)


def run(argv):
    config, args = flags.parse(__doc__, FLAGS, argv, need_config=False, defaults=saved_config)
    if args.config:
        raise InputError("--config", got=args.config, expected="nothing: a run has its own config", fix="Leave it out.")
    mesh = flags.mesh(args.mesh)
    from molora_jax import runtime

    runtime.configure()
    from molora_jax.evaluation import report as reports
    from molora_jax.evaluation.progress import Phases
    from molora_jax.evaluation.run import load_run
    from molora_jax.runs import remote

    phases = Phases()
    phases.start("run and base model", 1)
    loaded = load_run(args.workdir, args.step, config=config, mesh=mesh, warn=phases.note)
    phases.end()
    report = reports.evaluate(loaded, phases=phases)
    what = "an item" if reports.chooses(report) else "an answer token"
    print(f"step {report['step']} of {args.workdir}, test split ({report['held_out']}), NLL in nats {what}")
    print(reports.text_table(report))
    if report["without_items"]:
        print(f"no test item: {', '.join(report['without_items'])}")
    sys.stdout.flush()  # the table is printed whatever the disk does
    written = reports.write(loaded, report)
    paths = [*reports.pictures(loaded, report), written]
    remote.put_back(args.workdir, loaded.workdir, "report")
    for path in paths:
        print(path)


if __name__ == "__main__":
    flags.main(run)
