"""A table as lines of text for a terminal, and numbers as people read them."""

import unicodedata
from collections.abc import Collection, Iterable, Sequence


def text_table(header: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Collection[int]) -> str:
    """Return a table with a line below its header. numbers: columns that stand right."""
    lines = list(rows)
    widths = [max(_width(line[column]) for line in (header, *lines)) for column in range(len(header))]

    def line_of(cells: Sequence[str]) -> str:
        padded = []
        for column, (cell, width) in enumerate(zip(cells, widths, strict=True)):
            room = " " * (width - _width(cell))
            padded.append(room + cell if column in numbers else cell + room)
        return "  ".join(padded).rstrip()

    return "\n".join([line_of(header), line_of(["-" * width for width in widths]), *map(line_of, lines)])


def short_word(word: str, *, most: int = 60) -> str:
    """Return a word, or the head of a whole sentence, for one line of a table: at most `most` characters."""
    return word if len(word) <= most else word[: most - 1].rstrip() + "…"


def number_text(value: float) -> str:
    """Return a score or threshold with six digits at most; years and other whole numbers as they are."""
    if value == 0 or 1e-4 <= abs(value) < 1e9:
        whole = abs(value) >= 1e5
        return f"{value:,.0f}" if whole else f"{value:.6g}"
    return f"{value:.3g}"


def _width(text: str) -> int:
    """Return how many places a text takes in a terminal: most characters of Chinese and Japanese take two."""
    return sum(0 if unicodedata.combining(it) else 1 + (unicodedata.east_asian_width(it) in "WF") for it in text)
