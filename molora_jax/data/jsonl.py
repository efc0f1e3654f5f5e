"""`jsonl:PATH`: the rows of a user's file as JSON objects. What they mean: `rows.py`.

One object a line, or one list of objects (a `.json` file). Empty lines are no rows. What is no such object is a
`BadRow`: not UTF-8, not JSON (NaN and Infinity are not), a field twice, half a surrogate pair, nested deeper than 64,
or longer than 10 MB (known before it is parsed).
"""

import dataclasses
import json
import math
import pathlib

from molora_jax import stores
from molora_jax.errors import InputError
from molora_jax.io.files import plain

BOM = b"\xef\xbb\xbf"  # what Windows puts before UTF-8 text
MOST_BYTES = 10_000_000  # of a row
LARGE = 64_000_000  # bytes of a file: from here on its rows are not held in memory
MOST_DEPTH = 64
OTHER_FORMATS = {
    b"\x1f\x8b": "a gzip file", b"PK\x03\x04": "a zip file", b"PAR1": "a parquet file",
    b"\x28\xb5\x2f\xfd": "a zstd file", b"\xff\xfe": "UTF-16 text", b"\xfe\xff": "UTF-16 text",
    b"ARROW1": "an Arrow file", b"BZh": "a bzip2 file",
    b"\xfd7zXZ": "an xz file",
}  # fmt: skip


class BadRow(Exception):
    """A row that cannot be used: `got`, `expected`, `fix` as in `InputError`."""

    def __init__(self, got: str, expected: str, fix: str = 'Correct the row, or set `data.bad_rows="skip"`.'):
        super().__init__(got)
        self.got, self.expected, self.fix = got, expected, fix

    def at(self, path: str, row: int) -> InputError:
        return InputError(f"{path}, row {row}", got=self.got, expected=self.expected, fix=self.fix)


@dataclasses.dataclass(frozen=True)
class Unreadable:
    """A field's value that JSON does not have, from a file of another form: a row is bad where it uses the field."""

    got: str


def found(path: str, *, where: str, field: str = "data.tasks") -> pathlib.Path:
    """The file of a path or a URL.

    Raises:
      InputError: there is no such file.
    """
    try:
        return plain(pathlib.Path(stores.at_hand(path, where=field)).expanduser())
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(where, got=reason, expected="a readable file", fix="Correct the path.") from error


def value(raw: bytes):
    """One JSON value, read as strictly as a row is.

    Raises:
      BadRow: it is none.
    """
    if len(raw) > MOST_BYTES:
        raise BadRow(f"{len(raw):,} bytes", f"at most {MOST_BYTES:,}")
    text = _text(raw.removeprefix(BOM))
    try:
        found = json.loads(text, **_STRICT)
    except (ValueError, RecursionError) as error:
        raise BadRow(_no_json(error, text), "JSON") from None
    _check(found, text)
    return found


def is_large(file: pathlib.Path) -> bool:
    """Whether a file is read line by line (`stream`), its examples sorted on disk; one JSON list is read whole."""
    if file.stat().st_size <= LARGE:
        return False
    with open(file, "rb") as opened:
        return not opened.read(1000).removeprefix(BOM).lstrip().startswith(b"[")


def stream(file: pathlib.Path, *, where: str):
    """As `rows`, of a file of one object a line that need not fit into memory.

    Raises:
      InputError: it is of another format, or holds nothing but white space.
    """
    with open(file, "rb") as opened:
        _refuse_other_formats(opened.read(16), where)
        opened.seek(0)
        number, empty = 0, True
        while line := opened.readline(MOST_BYTES + 2):
            number += 1
            size = len(line)
            line = line.removeprefix(BOM) if number == 1 else line
            blank = not line.strip()
            while not line.endswith(b"\n") and (more := opened.readline(MOST_BYTES)):  # too long: not held
                size, blank = size + len(more), blank and not more.strip()
                line = line[: MOST_BYTES + 1] + more[-1:]
            last = not line.endswith(b"\n")
            line = line.removesuffix(b"\n")
            if not blank:
                empty = False
                try:
                    if size > MOST_BYTES + 2:
                        raise _too_long(size)
                    yield number, _line(line, last=last)
                except BadRow as bad:
                    yield number, bad
    if empty:
        raise _empty(where)


def content(file: pathlib.Path, *, where: str) -> bytes:
    """The file's bytes.

    Raises:
      InputError: there is no such file, it is empty, or of another format.
    """
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise InputError(
            where, got=error.strerror or str(error), expected="a readable file", fix="Correct the path."
        ) from error
    if not raw.removeprefix(BOM).strip():
        raise _empty(where)
    _refuse_other_formats(raw, where)
    return raw


def _refuse_other_formats(raw: bytes, where: str):
    for start, name in OTHER_FORMATS.items():
        if raw.startswith(start):
            fix = "Unpack it, or write it as JSON lines in UTF-8."
            fix = "Write parquet:PATH for it." if start == b"PAR1" else fix
            raise InputError(where, got=name, expected="one JSON object a line, in UTF-8", fix=fix)


def _empty(where: str) -> InputError:
    return InputError(where, got="an empty file", expected="one JSON object a line", fix="Add rows, or drop it.")


def _too_long(size: int) -> BadRow:
    return BadRow(f"a row of {size:,} bytes", f"at most {MOST_BYTES:,}", "Split it, or leave it out.")


def rows(raw: bytes, *, path: str):
    """Yields `(number from 1, dict or BadRow)` of each row.

    Raises:
      InputError: a list of rows that breaks off, so that the rest cannot be read.
    """
    raw = raw.removeprefix(BOM)
    lines = raw.split(b"\n")
    first = next((line.strip() for line in lines if line.strip()), b"")
    if first == b"[" or (first.startswith(b"[") and path.lower().endswith(".json")):
        yield from _items(raw, path)
        return
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield number, _line(line, last=number == len(lines))
            except BadRow as bad:
                yield number, bad


def _line(line: bytes, *, last: bool) -> dict:
    if len(line) > MOST_BYTES:
        raise _too_long(len(line))
    text = _text(line)
    try:
        row = json.loads(text, **_STRICT)
    except (ValueError, RecursionError) as error:
        got = _no_json(error, text)
        if last and not str(error).startswith("Extra data"):  # no newline after it
            raise BadRow(got, "a whole JSON object", "The last line looks cut off: write the file again.") from None
        raise BadRow(got, "one JSON object") from None
    return _checked(row, text)


def _text(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        got = f"a byte 0x{raw[error.start]:02x} at position {error.start} that is not UTF-8"
        raise BadRow(got, "UTF-8 text") from None


def _no_json(error, text: str) -> str:
    return f"invalid JSON ({getattr(error, 'msg', None) or error}) in {shown(text.strip())}"


def _items(raw: bytes, path: str):
    """The objects of one JSON list; row n is its n-th item."""
    try:
        text = _text(raw)
    except BadRow as bad:
        raise InputError(path, got=bad.got, expected=bad.expected) from None
    decoder, number, at = json.JSONDecoder(**_STRICT), 0, text.index("[") + 1

    def skip(at):
        while at < len(text) and text[at] in " \t\r\n":
            at += 1
        return at

    at = skip(at)
    while text[at : at + 1] != "]":
        number, begin = number + 1, at
        try:
            item, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            got = _no_json(error, text[begin : begin + 80])
            raise InputError(f"{path}, row {number} of the list", got=got, expected="one JSON object") from None
        try:
            if at - begin > MOST_BYTES:
                raise BadRow(f"a row of {at - begin:,} characters", f"at most {MOST_BYTES:,}", "Split it.")
            yield number, _checked(item, text[begin:at])
        except BadRow as bad:
            yield number, bad
        at = skip(at)
        if text[at : at + 1] == ",":
            at = skip(at + 1)
            if text[at : at + 1] == "]":
                got = f"a comma after row {number}, the last one, which is not JSON"
                raise InputError(path, got=got, expected="one list of JSON objects", fix="Take the comma out.")
        elif text[at : at + 1] != "]":
            got = f"{shown(text[at : at + 60])} after row {number}" if text[at:] else f"no end after row {number}"
            raise InputError(path, got=got, expected="one list of JSON objects", fix="Write the file again.")
    if text[at + 1 :].strip():
        got = f"{shown(text[at + 1 :].strip()[:60])} after the list"
        raise InputError(path, got=got, expected="one list of JSON objects", fix="Write one JSON object a line.")


def _pairs(pairs):
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the field {next(n for n in names if names.count(n) > 1)!r:.60} twice")
    return found


def _constant(name):
    raise ValueError(f"{name} is not JSON")


def _float(digits):
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits:.40} is no finite number")
    return value


_STRICT = dict(object_pairs_hook=_pairs, parse_constant=_constant, parse_float=_float)


def _checked(row, text: str) -> dict:
    """The row, which is an object."""
    if not isinstance(row, dict):
        fix = "Write one JSON object a line" + (", or name the file .json." if isinstance(row, list) else ".")
        raise BadRow(f"a JSON {kind(row)}", "a JSON object", f'{fix} `data.bad_rows="skip"` leaves such rows out.')
    _check(row, text)
    return row


def _check(value, text: str):
    """Refuses a value whose text is not all valid Unicode, or that is nested too deep."""
    if "\\u" not in text and text.count("[") + text.count("{") <= MOST_DEPTH:
        return
    left = [(value, "", 1)]
    while left:
        value, where, depth = left.pop()
        if depth > MOST_DEPTH:
            raise BadRow(f"values nested deeper than {MOST_DEPTH}", "a flatter object")
        if isinstance(value, dict):
            dot = f"{where}." if where else ""
            left += [(name, f"a name in {where or 'the row'}", depth) for name in value]
            left += [(item, f"{dot}{name}", depth + 1) for name, item in value.items()]
        elif isinstance(value, list):
            left += [(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value)]
        elif isinstance(value, str) and not value.isascii() and value.encode(errors="replace").decode() != value:
            raise BadRow(f"{ascii(where)[1:-1]} with half of a surrogate pair", "valid Unicode text")


def kind(value) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")


def shown(value) -> str:
    text = value if isinstance(value, str) else repr(value)
    return repr(text if len(text) <= 60 else text[:57] + "...")
