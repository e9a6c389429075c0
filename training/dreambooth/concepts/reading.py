"""Read a list of concepts in any form that people have: `import_concepts` finds out which it is."""

import codecs
import locale
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sharding.config import ConfigError
from training.config.concepts import ConceptsFile
from training.dreambooth.concepts.extension import is_path_key, looks_like_extension, read_extension
from training.dreambooth.concepts.folders import read_folders
from training.dreambooth.concepts.imported import Imported, Places, make_imported, pictures_in
from training.dreambooth.concepts.kohya import looks_like_kohya_folders, read_kohya_config, read_kohya_folders
from training.dreambooth.concepts.lenient_json import LenientJsonError, read_values
from training.dreambooth.concepts.onetrainer import looks_like_onetrainer, read_onetrainer

_LISTS = ("concepts", "concepts_list")


def import_concepts(path: Path, *, mapped: Sequence[tuple[str, str]] = ()) -> Imported:
    """Read concepts from a file or a folder.

    A folder is kohya's (`10_name`) or a tree with a folder per concept. A file is TOML (ours or kohya's dataset
    config) or JSON, however broken: the extension's concepts list or db_config.json, OneTrainer's, kohya's.
    mapped: (their path prefix, ours). Raises ConfigError when no concept can be read, FileNotFoundError.
    """
    notes: list[str] = []
    if path.is_dir():
        kind, tables = _read_folder(path, notes)
    elif not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder with concepts")
    else:
        text = _decoded(path, notes)
        places = Places(path.parent, tuple(mapped))
        kind, tables = _read_toml(text, places, notes) if path.suffix == ".toml" else _read_json(
            text, places, notes, name=str(path)
        )  # fmt: skip
    imported = make_imported(tables, kind=kind, notes=notes, name=str(path))
    return Imported(imported.concepts, kind, (*imported.notes, *_looked_at(imported)))


def _read_folder(path: Path, notes: list[str]) -> tuple[str, list[dict[str, Any]]]:
    if looks_like_kohya_folders(path):
        return "kohya's folders", read_kohya_folders(path, notes)
    return "a tree of folders", read_folders(path, notes)


def _read_toml(text: str, places: Places, notes: list[str]) -> tuple[str, list[dict[str, Any]]]:
    try:
        config = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"not valid TOML: {error}") from error
    if "datasets" in config:
        return "kohya's dataset config", read_kohya_config(config, places, notes)
    ConceptsFile.model_validate(config)
    return "concepts of ours", list(config["concepts"])


def _read_json(text: str, places: Places, notes: list[str], *, name: str) -> tuple[str, list[dict[str, Any]]]:
    try:
        values, repairs = read_values(text, is_path=is_path_key)
    except LenientJsonError as error:
        raise ConfigError(f"{name}: cannot be understood: {error}") from error
    notes += [str(repair) for repair in repairs]
    whole = values[0] if len(values) == 1 else None
    if isinstance(whole, Mapping) and "datasets" in whole:
        return "kohya's dataset config", read_kohya_config(whole, places, notes)
    kind = "the extension's concepts list"
    if isinstance(whole, Mapping):
        listed = next((key for key in _LISTS if isinstance(whole.get(key), list)), None)
        if listed is not None:
            kind, values = f"the list {listed!r} of a settings file", whole[listed]
    objects = _objects(values)
    if looks_like_extension(objects):
        return kind, read_extension(objects, places, notes)
    if looks_like_onetrainer(objects):
        return "OneTrainer's concepts", read_onetrainer(objects, places, notes)
    keys = sorted({key for one in objects for key in one})
    raise ConfigError(f"{name}: no list of concepts that is known here; its keys are {', '.join(keys) or 'none'}")


def _objects(values: Sequence[Any]) -> list[Mapping[str, Any]]:
    found: list[Mapping[str, Any]] = []
    for value in values:
        if isinstance(value, Mapping):
            found.append(value)
        elif isinstance(value, list):
            found += _objects(value)
    return found


def _decoded(path: Path, notes: list[str]) -> str:
    data = path.read_bytes()
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        notes.append("read as UTF-16")
        return data.decode("utf-16")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        encoding = locale.getpreferredencoding(do_setlocale=False)
        encoding = "cp1252" if encoding.lower().replace("-", "") == "utf8" else encoding
        notes.append(f"not UTF-8: read as {encoding}; look at its names")
        return data.decode(encoding, errors="replace")


def _looked_at(imported: Imported) -> list[str]:
    """Return a line for each concept: what is in its folder."""
    lines = []
    for concept in imported.concepts:
        folder = Path(concept.folder)
        pictures = pictures_in(folder) if folder.is_dir() else []
        captions = sum(picture.with_suffix(concept.caption_extension).is_file() for picture in pictures)
        lines.append(f"{concept.name}: {len(pictures):,} pictures, {captions:,} captions in {folder}")
    return lines
