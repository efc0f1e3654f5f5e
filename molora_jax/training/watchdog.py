"""A run that makes no step for too long says where it hangs, and ends.

Several processes wait for each other in every collective: where one hangs or is gone, the others would wait for ever.
"""

import faulthandler
import os
import pathlib
import sys
import threading
import time

EXIT = 1


class Watchdog:
    """Context manager. Between two calls of `beat` at most `seconds` may pass; 0 watches nothing.

    At the end of the time the process writes the stacks of all its threads to stderr and to `folder/hang-<process>.txt`
    and ends with status 1 and without clean-up: the main thread may never return. Checkpoints that are written whole
    stay.

    Args:
      process: this process's number, for the message and the file.
      end: what ends the process, for tests.
    """

    def __init__(self, seconds: float, folder, *, process: int = 0, end=None):
        self.seconds, self.folder, self.process = seconds, pathlib.Path(folder), process
        self._end = end or (lambda: os._exit(EXIT))
        self._doing, self._since = "starting", time.monotonic()
        self._left = threading.Event()

    def beat(self, doing: str) -> None:
        """Something was done; `doing` is what comes now."""
        self._doing, self._since = doing, time.monotonic()

    def __enter__(self):
        self.beat(self._doing)
        if self.seconds > 0:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_):
        self._left.set()

    def _watch(self):
        while True:
            left = self._since + self.seconds - time.monotonic()
            if left <= 0:
                return self._tell()
            if self._left.wait(left):
                return None

    def _tell(self):
        words = (
            f"error: train.hang_seconds: got {time.monotonic() - self._since:.0f} s without an end of {self._doing} in "
            f"process {self.process}; expected at most {self.seconds:g}. Look at the stacks below and at what the "
            "others say; raise train.hang_seconds where a step only takes long; start all of them again: they go on "
            "from the last saved step.\n"
        )
        os.write(2, words.encode())
        faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
        try:
            with open(self.folder / f"hang-{self.process}.txt", "w") as file:
                file.write(words)
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError:
            pass
        self._end()
