"""The table that the launch doctor prints. No torch."""

import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from training.exit_codes import BAD_DATA, DONE

Verdict = Literal["ok", "warn", "fail"]
_WIDTH = 120


@dataclass(frozen=True)
class Row:
    """One thing that was looked at."""

    what: str
    found: str
    wanted: str
    verdict: Verdict = "ok"
    advice: str = ""
    """What to do; empty when all is well."""


@dataclass(frozen=True)
class Report:
    """All rows. is_hung: something did not end; the process must not wait for it either."""

    rows: tuple[Row, ...]
    is_hung: bool = False

    @property
    def code(self) -> int:
        """The exit code: 3 when a row fails, else 0."""
        return BAD_DATA if any(row.verdict == "fail" for row in self.rows) else DONE

    def text(self) -> str:
        """Return the table for people: a line per row, what to do below it."""
        what, found = max(len(row.what) for row in self.rows), 58
        lines = [f"{'':<4}  {'what':<{what}}  {'found':<{found}}  wanted"]
        for row in self.rows:
            cells = _wrapped(row.found, found), _wrapped(row.wanted, max(_WIDTH - what - found - 10, 20))
            for number in range(max(map(len, cells))):
                left = (row.verdict, row.what) if number == 0 else ("", "")
                middle, right = (cell[number] if number < len(cell) else "" for cell in cells)
                lines.append(f"{left[0]:<4}  {left[1]:<{what}}  {middle:<{found}}  {right}".rstrip())
            if row.advice:
                indent = " " * (what + 8)
                lines += textwrap.wrap(
                    f"→ {row.advice}", _WIDTH, initial_indent=indent, subsequent_indent=indent + "  ",
                    break_long_words=False, break_on_hyphens=False,
                )  # fmt: skip
        counts = {verdict: sum(row.verdict == verdict for row in self.rows) for verdict in ("ok", "warn", "fail")}
        lines.append(f"{counts['ok']} ok, {counts['warn']} to think about, {counts['fail']} failed")
        return "\n".join(lines)

    def values(self) -> dict[str, Any]:
        """Return the same as plain data, with the exit code, which launchers do not pass on."""
        return {"code": self.code, "rows": [asdict(row) for row in self.rows]}


def listing(numbers: Sequence[int]) -> str:
    """Return ranks as people write them: 0–3, 5."""
    spans = list[list[int]]()
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(f"{first}" if first == last else f"{first}–{last}" for first, last in spans)


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_on_hyphens=False) or [""]
