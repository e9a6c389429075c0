"""What only people know of a model: title and introduction, release notes, limitations, words on the licence.

A Markdown file. What stands before its first heading, or below `# TITLE`, opens the card; each other heading names the
section of the card that its text becomes.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

SECTIONS = ("Release Notes", "SD.Next", "ComfyUI", "A1111", "Dataset", "Bias", "Limitations", "License")
"""Sections that may be given; `Dataset` stands above the tables there, the others replace what the card says itself."""
_HEADING = re.compile(r"#{1,6}\s+(.*?):?\s*#*")
_FENCE = re.compile(r"\s*(```|~~~)")


@dataclass(frozen=True)
class Notes:
    """See the module. Texts are lines; an absent section is not in `sections`."""

    title: str = ""
    opening: tuple[str, ...] = ()
    sections: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def read_notes(path: Path) -> Notes:
    """Read a file of notes. Raises FileNotFoundError, ValueError for a heading that is no section of a card."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(f"--notes {path}: no such file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"--notes {path}: not UTF-8 ({error})") from error
    title, current, in_code = "", "", False
    found: dict[str, list[str]] = {"": []}
    for number, line in enumerate(text.splitlines(), start=1):
        in_code ^= bool(_FENCE.match(line))
        heading = _HEADING.fullmatch(line) if not in_code else None
        if heading is None:
            found[current].append(line)
        elif heading[1] in SECTIONS:
            current = heading[1]
            found.setdefault(current, [])
        elif heading[1] == "Limitations and Bias":
            continue  # the card's own heading above the two
        elif line.startswith("# ") and not title and current == "":
            title = heading[1]
        else:
            raise ValueError(
                f"--notes {path}: line {number}: {heading[1]!r} is no section of the card that people write; there are "
                f"{', '.join(SECTIONS)}, and a first `# TITLE` with what opens the card"
            )
    sections = {name: _stripped(lines) for name, lines in found.items()}
    return Notes(title, sections.pop(""), {name: lines for name, lines in sections.items() if lines})


def _stripped(lines: list[str]) -> tuple[str, ...]:
    return tuple("\n".join(lines).strip("\n").splitlines())
