"""Tables that an importer looks things up in: kohya's `in_json`, a translation of tags, their categories.

Each is one file for a whole source, read once per process. What a table says about one picture is its *fingerprint*:
a changed table concerns only the pictures whose fingerprint changes.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from sharding.files import digest_of


class TableError(ValueError):
    """A table that the config names cannot be used."""


@dataclass(frozen=True)
class Tables:
    """Where the tables of a source lie; None where the config names none."""

    metadata: Path | None = None
    tag_dict: Path | None = None
    tag_categories: Path | None = None


NO_TABLES = Tables()


@dataclass(frozen=True)
class Entries:
    """kohya's entries by image, findable by more than the key they stand under."""

    by_key: Mapping[str, Any]
    """Keys with "/" as separator."""
    by_name: Mapping[str, Sequence[str]]
    """Keys with a folder, by file name."""

    def find(self, root: Path, path: PurePosixPath) -> Any:
        """Return the entry of a picture, or None.

        Tried in this order: its absolute path; its path below the root; that without ending (kohya's stem); an
        absolute path of another machine that ends with its path below the root, if there is only one.
        """
        for key in ((root.absolute() / path).as_posix(), path.as_posix(), path.with_suffix("").as_posix()):
            if key in self.by_key:
                return self.by_key[key]
        longer = [key for key in self.by_name.get(path.name, ()) if key.endswith(f"/{path}")]
        return self.by_key[longer[0]] if len(longer) == 1 else None


def read_table(path: Path) -> Mapping[str, Any]:
    """Read a JSON object. Raises TableError, FileNotFoundError."""
    status = path.stat()
    return _read_object(path, status.st_size, status.st_mtime_ns)


def read_entries(path: Path) -> Entries:
    """Read kohya's `in_json`: an object by image, or for `.jsonl` an object with image_path a line.

    Raises TableError, FileNotFoundError.
    """
    status = path.stat()
    return _read_entries(path, status.st_size, status.st_mtime_ns)


def fingerprint(tables: Tables, root: Path, path: PurePosixPath) -> str:
    """Return the digest of what the tables can say about one picture; "" without tables."""
    parts = []
    if tables.metadata is not None:
        parts.append(digest_of(read_entries(tables.metadata).find(root, path)))
    for table in (tables.tag_dict, tables.tag_categories):
        if table is not None:
            status = table.stat()
            parts.append(_digest(table, status.st_size, status.st_mtime_ns))
    return ",".join(parts)


@lru_cache(maxsize=8)
def _read_object(path: Path, num_bytes: int, modified_ns: int) -> Mapping[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise TableError(f"{path}: not valid JSON: {str(error)[:120]}") from error
    if not isinstance(value, dict):
        raise TableError(f"{path}: holds a {type(value).__name__}, not an object")
    return value


@lru_cache(maxsize=8)
def _digest(path: Path, num_bytes: int, modified_ns: int) -> str:
    return digest_of(dict(_read_object(path, num_bytes, modified_ns)))


@lru_cache(maxsize=8)
def _read_entries(path: Path, num_bytes: int, modified_ns: int) -> Entries:
    lines = path.suffix.lower() == ".jsonl"
    found = _read_lines(path) if lines else _read_object(path, num_bytes, modified_ns)
    by_key = {key.replace("\\", "/"): entry for key, entry in found.items()}
    by_name: dict[str, list[str]] = {}
    for key in by_key:
        if "/" in key:
            by_name.setdefault(key.rpartition("/")[2], []).append(key)
    return Entries(by_key, by_name)


def _read_lines(path: Path) -> dict[str, Any]:
    entries = {}
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
            if not line.strip():
                continue
            entry = json.loads(line)
            if not isinstance(entry, dict) or not isinstance(entry.get("image_path"), str):
                raise TableError(f"{path}: line {number}: needs an object with image_path")
            entries[entry["image_path"]] = entry
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise TableError(f"{path}: not valid JSON Lines: {str(error)[:120]}") from error
    return entries
