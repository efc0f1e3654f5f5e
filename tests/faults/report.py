"""What a worker tells the runner while it works: which try it is at, and what failed. One JSON line each.

A line goes out before each try, so that the runner can name the try in which a worker hung or died, and go on after it.
"""

import dataclasses
import json
import os
import time
import traceback

from molora_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Failure:
    """`seed` makes this try again: `python -m tests.faults --only=ROW --seed=SEED --tries=1`."""

    seed: int
    what: str


class Channel:
    """Lines to the runner; silent where there is none (a row called by hand)."""

    handle: int | None = None
    seconds: float = float("inf")  # the longest that a try may take

    def send(self, **line):
        if self.handle is not None:
            os.write(self.handle, (json.dumps(line) + "\n").encode())


CHANNEL = Channel()


def each(seed: int, tries: int, one) -> list[Failure]:
    """Calls `one(number)` for `tries` seeds from `seed` on; it returns what is wrong ("" or None: nothing).

    An exception is a failure too: a user must never meet a traceback.
    """
    failures = []
    for number in range(seed, seed + tries):
        CHANNEL.send(started=number)
        began = time.monotonic()
        try:
            what = one(number)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001 - a panic of Rust code is no Exception
            what = _shown(error)
        took = time.monotonic() - began
        if not what and took > CHANNEL.seconds:
            what = f"took {took:.0f} s, more than {CHANNEL.seconds:.0f}"
        if what:
            failures.append(Failure(number, what))
            CHANNEL.send(failed=dataclasses.asdict(failures[-1]))
    return failures


def refused(call, *words) -> str:
    """ "" where `call` raises an InputError that holds all the words; else what happened instead."""
    try:
        result = call()
    except InputError as error:
        return misnamed(error, *words)
    return f"not refused: {str(result)[:200]}"


def misnamed(error: InputError, *words) -> str:
    """ "" where an error says where, got and expected, and holds the words."""
    missing = [word for word in words if word not in str(error)]
    if missing or not error.where or not error.got or not error.expected:
        return f"the error does not name {', '.join(missing) or 'its place'}: {str(error)[:300]}"
    return ""


def _shown(error) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "/molora_jax/" in f.filename or "/launch/" in f.filename] or frames
    at = f"{ours[-1].filename.rsplit('/', 1)[-1]}:{ours[-1].lineno}" if ours else ""
    return f"{type(error).__name__} at {at}: {str(error).strip()[:300]}"
