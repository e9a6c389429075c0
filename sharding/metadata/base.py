"""What every importer shares: the Metadata record, sidecars, tags and dates as text.

Knows no site. Sidecars of `x/1.jpg` are `x/1.txt`, `x/1.jpg.txt`, `x/1.json` and `x/1.jpg.json`; the shorter name
wins when both exist. A picture in a tar has its sidecars there.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from sharding.sources import read_file

_MAX_SIDECAR_BYTES = 4 << 20
_FIRST_YEAR = 1990
_DAY_IN_PATH = re.compile(r"(?<!\d)(\d{4})-(\d{2})-(\d{2})(?!\d)")
_YEAR_FOLDER = re.compile(r"\d{4}")


class SidecarError(ValueError):
    """A sidecar exists but cannot be used; the message becomes `Metadata.problem`."""


@dataclass(frozen=True)
class Metadata:
    """What a source knows about one picture."""

    tags: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By category (schema.TAG_CATEGORIES), underscore form, in the source's order, each once."""
    rating: str = ""
    """One of schema.RATINGS, or ""."""
    created_at: datetime | None = None
    """When it was posted; UTC."""
    date_source: str = ""
    """`post` when created_at is set."""
    custom: Mapping[str, str] = field(default_factory=dict)
    flags: frozenset[str] = frozenset()
    """Those of is_deleted, is_banned, is_flagged, is_pending that are set."""
    problem: str = ""
    """Why a sidecar was not used, or ""."""


def sidecar_paths(path: str) -> tuple[str, ...]:
    """Return every place where metadata of a picture may lie, whether or not a file is there."""
    stem = path.rpartition(".")[0]
    return f"{stem}.txt", f"{path}.txt", f"{stem}.json", f"{path}.json"


def read_text_sidecar(root: Path, path: PurePosixPath) -> str | None:
    """Return the text beside a picture, or None if there is none. Raises SidecarError if it cannot be read."""
    return _read(root, path, ".txt")


def read_json_sidecar(root: Path, path: PurePosixPath) -> dict[str, Any] | None:
    """Return the JSON object beside a picture, or None if there is none. Raises SidecarError."""
    text = _read(root, path, ".json")
    if text is None:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SidecarError(f"JSON sidecar is not valid JSON: {str(error)[:120]}") from error
    if not isinstance(value, dict):
        raise SidecarError(f"JSON sidecar holds a {type(value).__name__}, not an object")
    return value


def _read(root: Path, path: PurePosixPath, ending: str) -> str | None:
    for place in sidecar_paths(str(path)):
        if not place.endswith(ending):
            continue
        candidate = root / place
        try:
            data = read_file(candidate, max_bytes=_MAX_SIDECAR_BYTES + 1)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise SidecarError(f"sidecar {candidate.name} cannot be read: {error.strerror}") from error
        if len(data) > _MAX_SIDECAR_BYTES:
            raise SidecarError(f"sidecar {candidate.name} is larger than {_MAX_SIDECAR_BYTES:,} bytes")
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise SidecarError(f"sidecar {candidate.name} is not UTF-8: byte {error.start}") from error
        if "\0" in text:
            raise SidecarError(f"sidecar {candidate.name} is not text: it holds NUL bytes")
        return text
    return None


def underscore_tags(tags: Iterable[str]) -> tuple[str, ...]:
    r"""Return tags in underscore form, each once, in order: spaces become "_", `\(` becomes "(".

    Kaomoji (`^_^`, `o_o`) have their underscores already and stay as they are.
    """
    forms = ("_".join(tag.replace("\\(", "(").replace("\\)", ")").split()) for tag in tags)
    return tuple(dict.fromkeys(form for form in forms if form))


def comma_tags(text: str) -> tuple[str, ...]:
    """Return the tags of a comma separated sidecar; line ends separate too."""
    return underscore_tags(text.replace("\n", ",").split(","))


def with_text_tags(metadata: Metadata, root: Path, path: PurePosixPath) -> Metadata:
    """Return `metadata`, with the tags of the txt sidecar as general ones if it has no tags."""
    if metadata.tags:
        return metadata
    try:
        text = read_text_sidecar(root, path)
    except SidecarError as error:
        return replace(metadata, problem="; ".join(filter(None, (metadata.problem, str(error)))))
    tags = comma_tags(text) if text else ()
    return replace(metadata, tags={"general": tags}) if tags else metadata


def parse_post_date(value: Any) -> datetime | None:
    """Return an ISO date as UTC, or None for what is absent or says nothing (`none`, `1970s`, a number).

    A date without a zone is read as UTC. Nothing is guessed: a decade is not a date.
    """
    if not isinstance(value, str) or len(value) < 10:
        return None
    try:
        date = datetime.fromisoformat(value.strip())
        return date.replace(tzinfo=UTC) if date.tzinfo is None else date.astimezone(UTC)
    except (ValueError, OverflowError):
        return None


def date_in_path(path: PurePosixPath, pattern: str = "") -> datetime | None:
    """Return the date that a path states: `YYYY-MM-DD` anywhere in it, else a folder named by a year.

    pattern: what to search instead, a regular expression with the groups year and, if it has them, month and day;
    without them the first of the year or month. Years from 1990 to the current one count; of several dates the last.
    """
    this_year = datetime.now(UTC).year
    if pattern:
        matches = [match.groupdict(default="1") for match in re.finditer(pattern, str(path))]
        return next((date for parts in reversed(matches) if (date := _date_of_parts(parts, this_year))), None)
    for year, month, day in reversed(_DAY_IN_PATH.findall(str(path))):
        if _FIRST_YEAR <= int(year) <= this_year:
            try:
                return datetime(int(year), int(month), int(day), tzinfo=UTC)
            except ValueError:
                continue
    for part in reversed(path.parts[:-1]):
        if _YEAR_FOLDER.fullmatch(part) and _FIRST_YEAR <= int(part) <= this_year:
            return datetime(int(part), 1, 1, tzinfo=UTC)
    return None


def _date_of_parts(parts: Mapping[str, str], this_year: int) -> datetime | None:
    try:
        date = datetime(int(parts["year"]), int(parts.get("month", 1)), int(parts.get("day", 1)), tzinfo=UTC)
    except ValueError:
        return None
    return date if _FIRST_YEAR <= date.year <= this_year else None
