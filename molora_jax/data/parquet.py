"""`parquet:PATH`: the rows of a parquet file, as those of a jsonl file are (`jsonl.py`). Extra `parquet` (pyarrow).

A null is a field that the row does not have: a column has a value in every row. Rows are read some thousand at a time.
A value that JSON does not have (a date, bytes, NaN, text that is not UTF-8) is `Unreadable`: the row is bad where that
field is used.
"""

import math

from molora_jax.data.jsonl import Unreadable
from molora_jax.errors import InputError

ROWS = 5_000  # read at once
NAMES = {"tuple": "map", "Decimal": "decimal"}  # of types, where Python's name is another


def opened(path, *, where: str):
    """The file.

    Raises:
      InputError: no pyarrow, no parquet file, one without a row, or one that has a name twice.
    """
    try:
        import pyarrow.parquet
    except ImportError:
        raise InputError(
            where, got="no pyarrow", expected="the extra `parquet`", fix="pip install 'molora_jax[parquet]'."
        ) from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
        number, twice = file.metadata.num_rows, _twice(file.schema_arrow, "")
    except _failures() as error:
        raise InputError(
            where, got=_told(error), expected="a parquet file", fix="Correct the path, or write it again."
        ) from None
    if number < 1:
        raise InputError(where, got="a file without rows", expected="at least one", fix="Add rows, or drop it.")
    if twice:
        raise InputError(where, got=f"the field {twice!r} twice", expected="each name once", fix="Rename one of them.")
    return file


def rows(file, *, path: str):
    """Yields `(number from 1, dict)` of each row.

    Raises:
      InputError: a damaged file.
    """
    number, batches = 0, file.iter_batches(batch_size=ROWS)
    while True:
        try:
            batch = next(batches, None)
            if batch is None:
                break
            named = zip(batch.schema.names, batch.columns, strict=True)
            columns = {name: _column(array, name) for name, array in named}
        except _failures() as error:
            raise _damaged(path, f"damage after row {number:,} ({_told(error)})") from None
        for i in range(batch.num_rows):
            number += 1
            yield number, {name: column[i] for name, column in columns.items() if column[i] is not None}
    if number != file.metadata.num_rows:
        raise _damaged(path, f"{number:,} rows where {file.metadata.num_rows:,} were written")


def _damaged(path, got) -> InputError:
    return InputError(path, got=got, expected="a parquet file as it was written", fix="Write it again.")


def _failures():
    """What pyarrow raises on files and values that are not as they should be."""
    import pyarrow

    return OSError, ValueError, OverflowError, MemoryError, pyarrow.ArrowException


def _told(error) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def _twice(fields, where: str) -> str:
    """A name that stands twice in a schema, or in a struct inside it; "" where there is none."""
    from pyarrow.types import is_struct

    names = [field.name for field in fields]
    for field in fields:
        name = f"{where}{field.name}"
        if names.count(field.name) > 1:
            return name
        inner = field.type
        while inner.num_fields and not is_struct(inner):  # of lists and maps, what they hold
            inner = inner.item_type if hasattr(inner, "item_type") else inner.value_type
        found = _twice(list(inner), f"{name}.") if is_struct(inner) else ""
        if found:
            return found
    return ""


def _column(array, name: str) -> list:
    """A value each, as JSON has it, without the fields that are null."""
    try:
        values = array.to_pylist()
    except _failures():  # one of them: which?
        values = [_value(array, i, name) for i in range(len(array))]
    return [_readable(value, name) for value in values]


def _value(array, i: int, name: str):
    try:
        return array[i].as_py()
    except UnicodeDecodeError as error:
        return Unreadable(f"{name} with a byte 0x{error.object[error.start]:02x} that is not UTF-8")
    except _failures() as error:
        return Unreadable(f"{name} that cannot be read ({_told(error)})")


def _readable(value, name: str):
    try:
        return _plain(value, name)
    except _NoJson as error:
        return Unreadable(str(error))


class _NoJson(Exception):
    pass


def _plain(value, where: str):
    if isinstance(value, dict):
        return {name: _plain(own, f"{where}.{name}") for name, own in value.items() if own is not None}
    if isinstance(value, list):
        return [_plain(own, f"{where}[{i}]") for i, own in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise _NoJson(f"{where}, which is {value}")
    if value is None or isinstance(value, (str, bool, int, float, Unreadable)):
        return value
    kind = type(value).__name__
    raise _NoJson(f"{where} of type {NAMES.get(kind, kind)}")
