"""Calls of the `tokenizers` package, whose Rust code panics where others raise."""

from molora_jax.errors import InputError


class guarded:  # noqa: N801 - a context manager, used like a function
    """Around calls of the `tokenizers` package: what it raises, panics of its Rust code too, is an `InputError`.

    TypeError passes: it is about the arguments. Rust writes a line or two about a panic to stderr first; that stays:
    the file descriptor belongs to all threads of the process, and turning it away would lose what they write.
    """

    def __init__(self, where: str, expected: str, fix: str = ""):
        self.where, self.expected, self.fix = where, expected, fix

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        if kind is None or issubclass(kind, (TypeError, InputError)):
            return
        if issubclass(kind, Exception) or kind.__name__ == "PanicException":  # a panic is a BaseException
            raise InputError(self.where, got=str(error)[:200], expected=self.expected, fix=self.fix) from None
