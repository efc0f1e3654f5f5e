"""The one error that a user's mistake raises.

`launch/*` print it as a single message and exit with status 2; nothing else is caught there, so a traceback always
means a fault of ours.
"""

import os
import re

# `gs://bucket/x`, also behind `dir:` or `jsonl:` and in a list
_REMOTE = re.compile(r"(?:^|[,:=])\s*([a-z][a-z0-9+.\-]{1,9}://[^,\s]*)", re.IGNORECASE)


class InputError(ValueError):
    """Bad input: a config field, a file or a row.

    Args:
      where: the field (`method.rules.ffn.router.k`) or the file and row (`train.jsonl, row 12`).
      got: what was found there.
      expected: what would have been right.
      fix: what the user should change, as an imperative.
    """

    def __init__(self, where: str, *, got: str, expected: str, fix: str = ""):
        self.where, self.got, self.expected, self.fix = where, got, expected, fix
        message = f"{where}: got {got}; expected {expected}."
        super().__init__(f"{message} {fix}".rstrip())

    def inside(self, place: str) -> "InputError":
        """The same mistake, of a part of `place`: `--grid, a: optim.name`."""
        return InputError(f"{place}: {self.where}", got=self.got, expected=self.expected, fix=self.fix)


def urls(path) -> list[str]:
    """The URLs in a path, or in a text with paths in it: `gs://b/a` of `jsonl:gs://b/a`."""
    return _REMOTE.findall(os.fspath(path)) if isinstance(path, (str, os.PathLike)) else []


def local(where: str, path):
    """The path, if it is of a file system that is mounted here.

    Raises:
      InputError: a URL such as `gs://bucket/run`, which `pathlib` takes for a folder called `gs:`.
    """
    found = urls(path)
    if found:
        raise InputError(
            where, got=found[0], expected="a path of a mounted file system",
            fix="Only a run's folder, its inputs and finished runs may lie on an object store: write it to a disk.",
        )  # fmt: skip
    return path
