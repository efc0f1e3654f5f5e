"""The one error that a user's mistake raises.

`launch/*` print it as a single message and exit with status 2; nothing else is caught there, so a traceback always
means a fault of ours.
"""


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
