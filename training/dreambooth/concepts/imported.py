"""What every reader of foreign concept lists gives back, and what they share: names, places, messages."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from sharding.config import ConfigError, parse_config
from training.config.concepts import ConceptConfig, ConceptsFile
from training.frozen_config import to_toml

PICTURE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".avif", ".jxl", ".gif", ".tif", ".tiff"})
_DRIVE = re.compile(r"[A-Za-z]:[\\/]|\\\\")


@dataclass(frozen=True)
class Imported:
    """Concepts read from a foreign list, and what the reader has to say about them."""

    concepts: tuple[ConceptConfig, ...]
    kind: str
    """What the list was taken for."""
    notes: tuple[str, ...]
    """What was repaired, is read otherwise than there, or means nothing here."""

    def toml(self) -> str:
        """Return it as a file of ours; defaults are left out."""
        return "\n".join(_concept_toml(concept) for concept in self.concepts)


def make_imported(raw: Sequence[Mapping[str, Any]], *, kind: str, notes: Sequence[str], name: str) -> Imported:
    """Check concepts given as plain tables of ours. Raises ConfigError when none is left or one is wrong."""
    if not raw:
        raise ConfigError(f"{name}: read as {kind}, but there is no concept in it that can be trained")
    checked = parse_config({"concepts": _named_apart(raw)}, ConceptsFile, name=name)
    return Imported(checked.concepts, kind, tuple(notes))


def name_of_folder(folder: str) -> str:
    """Return the last part of a path of any system."""
    return (PureWindowsPath(folder) if "\\" in folder or _DRIVE.match(folder) else PurePosixPath(folder)).name


def pictures_in(folder: Path) -> list[Path]:
    """Return the pictures in a folder and below, sorted; hidden ones are none."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in PICTURE_SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


@dataclass(frozen=True)
class Places:
    """Where folders of a list lie on this machine. beside: the list's own folder; mapped: (their prefix, ours)."""

    beside: Path
    mapped: tuple[tuple[str, str], ...] = ()

    def find(self, folder: str, notes: list[str]) -> str:
        """Return the folder as it is here; a note tells when it was looked for, or is not there."""
        if not folder:
            return ""
        for theirs, ours in self.mapped:
            if _plain(folder).startswith(_plain(theirs)):
                rest = _plain(folder)[len(_plain(theirs)) :].strip("/")
                return str(Path(ours) / folder[len(folder) - len(rest) :].replace("\\", "/")) if rest else ours
        if Path(folder).is_absolute() and Path(folder).is_dir():
            return folder
        if not _DRIVE.match(folder) and "\\" not in folder:
            beside = self.beside / folder
            if beside.is_dir():
                return str(beside)
            notes.append(f"{folder}: no such folder")
            return folder
        parts = PureWindowsPath(folder).parts
        for length in (1, 2, 3):
            found = self.beside.joinpath(*parts[-length:])
            if len(parts) > length and found.is_dir():
                notes.append(f"{folder}: found beside the list as {found}")
                return str(found)
        notes.append(f"{folder}: a path of another machine; give --map 'ITS PREFIX=YOUR FOLDER'")
        return folder


def _plain(folder: str) -> str:
    return folder.replace("\\", "/").rstrip("/").lower()


def _named_apart(raw: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the tables with a number behind names that come again."""
    seen: dict[str, int] = {}
    apart = []
    for table in raw:
        seen[table["name"]] = count = seen.get(table["name"], 0) + 1
        apart.append({**table, "name": table["name"] if count == 1 else f"{table['name']} {count}"})
    return apart


def _concept_toml(concept: ConceptConfig) -> str:
    given = concept.model_dump(mode="json", exclude_defaults=True)
    tables = {key: value for key, value in given.items() if isinstance(value, dict)}
    text = "[[concepts]]\n" + to_toml({key: value for key, value in given.items() if key not in tables})
    for key, table in tables.items():
        text += f"[concepts.{key}]\n{to_toml(table)}"
    return text
