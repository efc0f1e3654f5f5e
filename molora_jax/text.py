"""Text for people: columns."""


def columns(rows, *, right=()) -> list[str]:
    """A line a row, each column as wide as its widest cell. `right` columns are set flush right."""
    widths = _widths(rows)
    lines = []
    for row in rows:
        pairs = enumerate(zip(map(str, row), widths, strict=True))
        lines.append("  ".join(x.rjust(w) if c in right else x.ljust(w) for c, (x, w) in pairs).rstrip())
    return lines


def table(rows, *, right=()) -> str:
    """`columns` with a rule below the first row, the heading."""
    heading, *lines = columns(rows, right=right)
    return "\n".join([heading, "  ".join("-" * w for w in _widths(rows)), *lines])


def _widths(rows) -> list[int]:
    return [max(len(str(row[c])) for row in rows) for c in range(len(rows[0]))]
