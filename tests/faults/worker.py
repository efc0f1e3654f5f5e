"""A process that works through rows: requests on standard input, the lines of `report.py` on standard output.

jax is imported once for all rows of a worker; what a row prints goes to standard error.
"""

import gc
import importlib
import json
import os
import resource
import sys
import traceback

from tests.faults.report import CHANNEL
from tests.faults.table import ROWS, SELFTEST


def main():
    CHANNEL.handle = os.dup(1)
    os.dup2(2, 1)  # what is printed goes where errors go
    rows = {row.name: row for row in (*ROWS, SELFTEST)}
    for line in sys.stdin:
        request = json.loads(line)
        row = rows[request["row"]]
        CHANNEL.seconds = row.seconds
        module, name = row.function.split(":")
        try:
            function = getattr(importlib.import_module(f"tests.faults.{module}"), name)
            CHANNEL.send(ready=row.name)
            began = _processor_seconds()
            function(request["seed"], request["tries"])
            CHANNEL.send(done=row.name, processor_seconds=_processor_seconds() - began)
        except Exception:  # noqa: BLE001 - what a row sets up before its first try
            CHANNEL.send(broken=traceback.format_exc()[-1500:])
        gc.collect()


def _processor_seconds() -> float:
    """Of this process and of the children that it waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


if __name__ == "__main__":
    main()
