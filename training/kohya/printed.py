"""An explanation as text for people, and as values for programs. No torch."""

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from training.commented_toml import shown
from training.kohya.explanation import Explanation

_GAP = "  "
_NARROWEST = 80


def explanation_text(explanation: Explanation, *, width: int = 160) -> str:
    """Return the table and what does not fit in it. width: letters of a line; 80 at least."""
    lines = [f"{explanation.script}.py", "", *_table(explanation, max(width, _NARROWEST))]
    if explanation.without_flag:
        lines += ["", "Without a flag, kohya does this, too:"]
        lines += [f"  {one.key} = {shown(one.value)}  ({one.why})" for one in explanation.without_flag]
    if explanation.unknown:
        lines += ["", "Not known here:"]
        lines += [f"  {' '.join(part for part in (one.name, one.value) if part)}  {one.hint}".rstrip()
                  for one in explanation.unknown]  # fmt: skip
    if explanation.problems:
        lines += ["", "Cannot be done here as it was:"]
        lines += [f"  --{one.flag}: {one.text}" for one in explanation.problems]
    if explanation.notes:
        lines += ["", "Mind:", *(f"  {note}" for note in explanation.notes)]
    lines += ["", "Commands:", *(f"  {command}" for command in explanation.commands)]
    return "\n".join(lines)


def explanation_values(explanation: Explanation) -> dict[str, Any]:
    """Return the same for programs."""
    return {**asdict(explanation), "given": sorted(explanation.given)}


def _table(explanation: Explanation, width: int) -> Iterator[str]:
    first = width // 4
    second = (width - first - 2 * len(_GAP)) // 2
    widths = (first, second, width - first - second - 2 * len(_GAP))
    yield _line(("flag", "here", "kohya"), widths)
    yield _line(tuple("-" * one for one in widths), widths)
    for row in explanation.rows:
        cells = (
            _wrapped([f"{row.flag} {row.value}".strip()], first),
            _wrapped(row.here, second),
            _wrapped([row.kohya], widths[2]),
        )
        for number in range(max(map(len, cells))):
            yield _line(tuple(cell[number] if number < len(cell) else "" for cell in cells), widths)


def _wrapped(texts: Iterable[str], width: int) -> list[str]:
    return [line for text in texts for line in textwrap.wrap(text, width, subsequent_indent="  ") or [""]]


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return _GAP.join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
