"""`parquet:PATH`: the rows of a parquet file, as those of a jsonl file are (`jsonl.py`). Extra `parquet` (pyarrow).

A null is a field that the row does not have: a column has a value in every row. Rows are read some thousand at a time.
"""

from molora_jax.data.jsonl import BadRow
from molora_jax.errors import InputError

ROWS = 5_000  # read at once


def opened(path, *, where: str):
    """The file.

    Raises:
      InputError: no pyarrow, no parquet file, or one without a row.
    """
    try:
        import pyarrow.parquet
    except ImportError:
        raise InputError(
            where, got="no pyarrow", expected="the extra `parquet`", fix="pip install 'molora_jax[parquet]'."
        ) from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(
            where, got=str(error).splitlines()[0][:200], expected="a parquet file",
            fix="Correct the path, or write it again.",
        ) from None  # fmt: skip
    if not file.metadata.num_rows:
        raise InputError(where, got="a file without rows", expected="at least one", fix="Add rows, or drop it.")
    return file


def rows(file):
    """Yields `(number from 1, dict or BadRow)` of each row."""
    number = 0
    for batch in file.iter_batches(batch_size=ROWS):
        for row in batch.to_pylist():
            number += 1
            try:
                yield number, _plain(row, "")
            except BadRow as bad:
                yield number, bad


def _plain(value, where: str):
    """A value as JSON has it, without the fields that are null."""
    if isinstance(value, dict):
        dot = f"{where}." if where else ""
        return {name: _plain(own, f"{dot}{name}") for name, own in value.items() if own is not None}
    if isinstance(value, list):
        return [_plain(own, f"{where}[{i}]") for i, own in enumerate(value)]
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    raise BadRow(f"{where}, a {type(value).__name__}", "text, numbers, lists and structs", "Write the column as text.")
