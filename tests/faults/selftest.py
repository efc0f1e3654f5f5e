"""Faults of the runner's own rows: a try that hangs, one that dies, one that raises."""

import os
import time

from tests.faults.report import each


def faults(seed, tries):
    def one(number):
        if number == 1:
            time.sleep(60)
        if number == 3:
            os._exit(3)
        if number == 5:
            raise ValueError("wrong")
        return ""

    return each(seed, tries, one)
