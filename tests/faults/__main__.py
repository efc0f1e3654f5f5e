"""The fault matrix: every promise of docs/reliability.md, tried with seeded faults.

    python -m tests.faults [--full] [--json] [--only=ROW,...] [--seed=N] [--tries=N] [--workers=N]

Without --full each row gets a few tries (half a minute in all); --full takes up to 20 minutes on 2 cores. A row's name,
or the first part of it (`damage`), goes into --only. Exit status 1 where any try failed; each is listed with its seed,
and `--only=ROW --seed=SEED --tries=1` does it again.
"""

import argparse
import json
import sys
import textwrap

from tests.faults import runner
from tests.faults.table import ROWS

SHOWN = 5  # failures of a row that the table lists; --json has them all


def chosen(only: str):
    names = [name.strip() for name in only.split(",") if name.strip()]
    rows = [row for row in ROWS if not names or any(row.name == n or row.name.startswith(f"{n}.") for n in names)]
    if not rows:
        raise SystemExit(f"--only={only}: no such row; there are {', '.join(row.name for row in ROWS)}")
    return rows


def line(result) -> str:
    text = result.row.promise
    return f"{result.row.name:<22} {text:<92.92} {result.tries:>5} {len(result.failures):>8} {result.seconds:>7.0f} s"


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", default="", metavar="ROW")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tries", type=int)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args(argv)
    rows = chosen(args.only)
    none = [row.name for row in rows if not (args.tries or (row.full if args.full else row.tries))]
    if args.only and none:
        told = f"--only={args.only}: {', '.join(none)}: tried with --full only (or --tries=N)"
        if len(none) == len(rows):
            raise SystemExit(told)
        print(told, file=sys.stderr)
    head = f"{'row':<22} {'promise':<92} {'tries':>5} {'failures':>8} {'time':>9}"
    done = []

    def tell(result):
        done.append(result)
        if sys.stderr.isatty():
            print(f"\r\x1b[K{len(done)}/{len(rows)}  {line(result)}", file=sys.stderr)
        else:
            print(f"{len(done)}/{len(rows)} {result.row.name}: {len(result.failures)} of {result.tries} failed, "
                  f"{result.seconds:.0f} s", file=sys.stderr, flush=True)  # fmt: skip

    results = runner.run(rows, full=args.full, seed=args.seed, tries=args.tries, tell=tell, workers=args.workers)
    if args.json:
        print(json.dumps([result.as_dict() for result in results], indent=1))
    else:
        print(head)
        for result in results:
            print(line(result))
            for failure in result.failures[:SHOWN]:
                print(textwrap.indent(textwrap.fill(f"seed {failure.seed}: {failure.what}", 110), "    "))
            if len(result.failures) > SHOWN:
                print(f"    and {len(result.failures) - SHOWN} more (--json lists them)")
        tries, failures = (sum(n) for n in zip(*((r.tries, len(r.failures)) for r in results), strict=True))
        print(f"{len(results)} promises, {tries} tries, {failures} failures")
    return 1 if any(result.failures for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
