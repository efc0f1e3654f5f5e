"""A process that works through rows: requests on standard input, the lines of `report.py` on standard output.

jax is imported once for all rows of a worker; what a row prints goes to standard error.
"""

import gc
import importlib
import json
import os
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
            function(request["seed"], request["tries"])
            CHANNEL.send(done=row.name)
        except Exception:  # noqa: BLE001 - what a row sets up before its first try
            CHANNEL.send(broken=traceback.format_exc()[-1500:])
        gc.collect()


if __name__ == "__main__":
    main()
