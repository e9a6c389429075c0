"""Write settings as a TOML file in which each key has a comment. No torch."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from training.frozen_config import to_toml

_LINE_LENGTH = 120


@dataclass(frozen=True)
class Line:
    """One key."""

    key: str
    """Dotted. A number behind a table's name (`stages.0.epochs`) counts tables of a list."""
    value: Any
    comment: str = ""
    is_off: bool = False
    """Written as a comment."""


def commented_toml(lines: Iterable[Line], *, head: Sequence[str]) -> str:
    """Return the file's text: the head's lines as comments, then keys in order, each table's in one piece."""
    written = [f"# {line}".rstrip() for line in head]
    table = None
    for line in lines:
        place, _, last = line.key.rpartition(".")
        if place != table:
            name, _, number = place.rpartition(".")
            header = f"[[{name}]]" if number.isdecimal() else f"[{place}]"
            written += ["", header] if place else [""]
            table = place
        written += _written(last, line)
    return "\n".join(written) + "\n"


def shown(value: Any) -> str:
    """Return a value as TOML writes it."""
    return to_toml({"value": value}).partition("=")[2].strip()


def _written(key: str, line: Line) -> list[str]:
    text = f"{'# ' * line.is_off}{key} = {shown(line.value)}"
    if not line.comment:
        return [text]
    if len(text) + len(line.comment) + 4 <= _LINE_LENGTH and "\n" not in text:
        return [f"{text}  # {line.comment}"]
    return [f"# {line.comment}", text]
