"""Text for people: columns."""


def table(rows, *, right=()) -> str:
    """Columns of text; the first row is the heading. `right` columns are set flush right."""
    widths = [max(len(str(row[c])) for row in rows) for c in range(len(rows[0]))]
    lines = []
    for i, row in enumerate(rows):
        pairs = enumerate(zip(map(str, row), widths, strict=True))
        cells = [x.rjust(w) if c in right else x.ljust(w) for c, (x, w) in pairs]
        lines.append("  ".join(cells).rstrip())
        if i == 0:
            lines.append("  ".join("-" * w for w in widths))
    return "\n".join(lines)
