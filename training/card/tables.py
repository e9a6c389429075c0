"""Tables and numbers in the form of the seed's card: dots between thousands, chunk numbers of three digits."""

from collections.abc import Sequence

from sharding.chunk import HELD_OUT_NAME

TOTAL = "Total"


def dotted(number: int) -> str:
    """Return `1.848.331`."""
    return f"{number:,}".replace(",", ".")


def padded(number: int, total: int) -> str:
    """Return a number of chunks as wide as the total is, at least three digits: `017`."""
    return f"{number:0{max(3, len(str(total)))}d}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table whose first column is bold."""
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for first, *others in rows:
        lines.append("| " + " | ".join([f"**{_cell(first)}**" if first else "", *map(_cell, others)]) + " |")
    return lines


def _cell(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")


def in_order(names: Sequence[str], order: Sequence[str]) -> list[str]:
    """Return names without repeats: those of `order` first, in its order; the others as they come."""
    known = dict.fromkeys(name for name in names if not name.endswith(f"/{HELD_OUT_NAME}"))
    return [name for name in dict.fromkeys(order) if name in known] + [name for name in known if name not in order]
