"""Tables of tags for a policy: written in the TOML itself, or in a file that the policy names.

A list is TOML's own or a .txt file with one tag a line. A map (tag → tag) and lists by tag (tag → tags) are tables,
.toml files of the same form, or .csv files with two columns, one pair a line, further columns ignored. A name without
an ending is one of the tables that come with the package (`tag_tables/NAME.toml`). A line of a .txt or .csv that begins
with "# " is a comment; without the space it is a tag (`#compass`). Files are read when the
policy is, so that their content, not their name, decides whether captions are current. Tags are in underscore form.
"""

import csv
import tomllib
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator

SHIPPED = Path(__file__).parent / "tag_tables"
_NUM_COMPLETION_COLUMNS = 4


def _read_list(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    lines = _text(Path(value), endings=(".txt",)).splitlines()
    return tuple(line.strip() for line in lines if line.strip() and not _is_comment(line))


def _read_map(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    path = _path(value)
    if path.suffix == ".toml":
        return _toml(path)
    rows = _rows(path)
    if rows and all(len(row) == _NUM_COMPLETION_COLUMNS and row[1].isdigit() for row in rows):
        # A list for tag completion: tag, category, count, "alias,alias". What it lists as a tag is no other name.
        tags = {row[0] for row in rows}
        pairs = [(alias.strip(), row[0]) for row in reversed(rows) for alias in row[3].split(",")]
        return {alias: tag for alias, tag in pairs if alias and alias not in tags}
    return {row[0]: row[1] for row in rows}


def _read_lists(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    path = _path(value)
    if path.suffix == ".toml":
        return _toml(path)
    lists: dict[str, list[str]] = {}
    for row in _rows(path):
        lists.setdefault(row[0], []).append(row[1])
    return lists


TagList = Annotated[tuple[str, ...], BeforeValidator(_read_list)]
TagMap = Annotated[dict[str, str], BeforeValidator(_read_map)]
TagLists = Annotated[dict[str, tuple[str, ...]], BeforeValidator(_read_lists)]


def shipped_lists(name: str) -> dict[str, tuple[str, ...]]:
    """Return a table of the package, group → tags and patterns."""
    return {group: tuple(tags) for group, tags in _toml(SHIPPED / f"{name}.toml").items()}


def _path(value: str) -> Path:
    shipped = SHIPPED / f"{value}.toml"
    return shipped if "/" not in value and shipped.is_file() else Path(value)


def _text(path: Path, *, endings: tuple[str, ...]) -> str:
    if path.suffix not in endings:
        shipped = ", ".join(sorted(it.stem for it in SHIPPED.glob("*.toml")))
        raise ValueError(
            f"{path}: a table of tags is a file that ends in {' or '.join(endings)}"
            + (f", or one of {shipped}" if ".toml" in endings else "")
        )
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as a table of tags: {error}") from error


def _is_comment(line: str) -> bool:
    return line == "#" or line.startswith("# ")


@lru_cache(maxsize=8)
def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(_text(path, endings=(".toml", ".csv")))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: not valid TOML: {error}") from error


def _rows(path: Path) -> list[list[str]]:
    text = _text(path, endings=(".toml", ".csv"))
    rows = [row for row in csv.reader(text.splitlines()) if row and not _is_comment(row[0])]
    for row in rows:
        if len(row) < 2 or not row[0].strip():
            raise ValueError(f"{path}: {','.join(row)!r} is not two columns separated by a comma")
    return [[cell.strip() for cell in row] for row in rows]
