"""A table as lines of text for a terminal."""

from collections.abc import Collection, Iterable, Sequence


def text_table(header: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Collection[int]) -> str:
    """Return a table with a line below its header. numbers: columns that stand right."""
    lines = list(rows)
    widths = [max(len(line[column]) for line in (header, *lines)) for column in range(len(header))]

    def line_of(cells: Sequence[str]) -> str:
        aligned = (
            cell.rjust(width) if column in numbers else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join(aligned).rstrip()

    return "\n".join([line_of(header), line_of(["-" * width for width in widths]), *map(line_of, lines)])
