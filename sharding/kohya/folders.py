"""What kohya's sd-scripts would train on in a folder: its subsets, their repeats and captions.

Three forms: a folder with an `in_json`, folders named `REPEATS_class tokens` (DreamBooth), and the subsets of a
`dataset_config` in TOML or JSON. Reads only; the rules are those of kohya's stable-cascade and main branches.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from sharding.config import ConfigError, read_toml
from sharding.images import EXTENSIONS
from sharding.metadata.tables import read_entries

CAPTION_ENDINGS = (".txt", ".caption")
"""What everyone sets, and kohya's default."""
_REPEATS_FOLDER = re.compile(r"(\d+)_(.+)")
_CARRIED = ("image_dir", "metadata_file", "num_repeats", "class_tokens", "caption_extension", "is_reg", "subsets")


@dataclass(frozen=True)
class Subset:
    """One folder as kohya reads it."""

    folder: Path
    metadata: Path | None = None
    repeats: int = 1
    class_tokens: str = ""
    """The caption of a picture that has none."""
    caption_ending: str = ""
    """With its dot; "" takes whichever of CAPTION_ENDINGS a picture has."""


@dataclass(frozen=True)
class Found:
    """The subsets of a folder, and what was seen and is none, each with its reason."""

    subsets: tuple[Subset, ...]
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Texts:
    """The texts of a subset by path. is_plain: our importers read the same ones from where they stand."""

    by_path: Mapping[str, str]
    is_plain: bool

    @property
    def words(self) -> set[str]:
        """All that stands between commas."""
        return {word.strip() for text in self.by_path.values() for word in text.split(",")}


def pictures_in(folder: Path) -> list[Path]:
    """Return the pictures right in a folder, by name: kohya does not look further down."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in EXTENSIONS and path.is_file())


def _pictures_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS and path.is_file())


def subsets_of_folder(folder: Path) -> Found:
    """Return the folders `REPEATS_class tokens` below `folder`, or, where there are none, the folder itself.

    Raises ValueError when there is no picture in any of them.
    """
    subsets, left_out = [], []
    for path in sorted(path for path in folder.iterdir() if path.is_dir()):
        match = _REPEATS_FOLDER.fullmatch(path.name)
        if match and int(match[1]) > 0 and pictures_in(path):
            subsets.append(Subset(path, repeats=int(match[1]), class_tokens=match[2]))
        elif pictures_in(path):
            why = "0 repeats" if match else "its name is not REPEATS_class tokens, so kohya ignores it"
            left_out.append(f"{path}: {why}")
    own = pictures_in(folder)
    if subsets and own:
        left_out.append(f"{len(own):,} pictures right in {folder}: kohya reads only the folders REPEATS_class tokens")
    if not subsets and own:
        subsets = [Subset(folder)]
    if not subsets:
        raise ValueError(f"{folder}: no pictures in it, and none in folders named REPEATS_class tokens below it")
    return Found(tuple(subsets), tuple(left_out))


def subset_with_metadata(folder: Path, metadata: Path, *, repeats: int = 1) -> Found:
    """Return a folder with its in_json. Raises FileNotFoundError, TableError for one that is not understood."""
    if not metadata.is_file():
        raise FileNotFoundError(f"{metadata}: no such in_json")
    entries = read_entries(metadata)
    pictures = [(path, PurePosixPath(path.relative_to(folder).as_posix())) for path in _pictures_below(folder)]
    without = [path for path, name in pictures if entries.find(folder, name) is None]
    left_out = []
    if len(without) == len(pictures):
        raise ValueError(f"{folder}: none of its {len(pictures):,} pictures has an entry in {metadata}")
    if without:
        left_out.append(
            f"{len(without):,} pictures of {folder} have no entry in {metadata.name}, first {without[0].name}: kohya "
            "ignores them, scan takes them without a caption"
        )
    return Found((Subset(folder, metadata, repeats),), tuple(left_out))


def subsets_of_config(path: Path, folder: Path) -> Found:
    """Return the subsets of a dataset_config; an image_dir that is not absolute is below `folder`.

    Raises ConfigError for what kohya would refuse, FileNotFoundError for a folder or in_json that is not there.
    """
    values = _read_config(path)
    subsets: list[Subset] = []
    left_out: list[str] = []
    unused: set[str] = set(values.get("general", {}))
    for dataset in _tables(values, "datasets", path):
        unused |= set(dataset)
        for own in _tables(dataset, "subsets", path):
            unused |= set(own)
            found = _subset({**values.get("general", {}), **dataset, **own}, path, folder)
            subsets += found.subsets
            left_out += found.left_out
    if settings := sorted(unused - set(_CARRIED)):
        left_out.append(f"{', '.join(settings)}: settings of training")
    if not subsets:
        raise ConfigError(f"{path}: no subset with pictures to train")
    return Found(tuple(subsets), tuple(left_out))


def _read_config(path: Path) -> Mapping[str, Any]:
    if path.suffix.lower() != ".json":
        return read_toml(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such dataset_config") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds a {type(values).__name__}, not an object")
    return values


def _tables(values: Mapping[str, Any], name: str, path: Path) -> Sequence[Mapping[str, Any]]:
    tables = values.get(name, [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables) or not tables:
        raise ConfigError(f"{path}: needs at least one [[{'datasets.' if name == 'subsets' else ''}{name}]]")
    return tables


def _subset(values: Mapping[str, Any], path: Path, folder: Path) -> Found:
    kinds = {"image_dir": str, "metadata_file": str, "num_repeats": int, "class_tokens": str, "caption_extension": str}
    for name, kind in kinds.items():
        if name in values and (not isinstance(values[name], kind) or isinstance(values[name], bool)):
            raise ConfigError(f"{path}: {name}: must be a {kind.__name__}, got {values[name]!r}")
    if "image_dir" not in values:
        raise ConfigError(f"{path}: a subset has no image_dir, so its pictures cannot be found")
    image_dir = folder / values["image_dir"]
    if not image_dir.is_dir():
        raise FileNotFoundError(f"{path}: image_dir {image_dir}: no such folder")
    repeats = values.get("num_repeats", 1)
    if repeats < 1:
        return Found((), (f"{image_dir}: {repeats} repeats",))
    if values.get("is_reg"):
        return Found((), (f"{image_dir}: regularisation pictures; class images are a setting of training",))
    if "metadata_file" in values:
        return subset_with_metadata(image_dir, folder / values["metadata_file"], repeats=repeats)
    ending = values.get("caption_extension", "")
    subset = Subset(image_dir, None, repeats, values.get("class_tokens", ""), ending and "." + ending.lstrip("."))
    return Found((subset,))


def texts_of(subset: Subset) -> Texts:
    """Return what kohya would train on, by path below the folder.

    With an in_json its caption and tags, joined; else the first line of the sidecar; without one the class tokens.
    Raises ValueError for a sidecar that is not UTF-8, TableError for an in_json that is not understood.
    """
    if subset.metadata is not None:
        return _texts_of_metadata(subset.folder, subset.metadata)
    texts, is_plain = {}, True
    for picture in pictures_in(subset.folder):
        endings = (subset.caption_ending,) if subset.caption_ending else CAPTION_ENDINGS
        sidecar = next((path for ending in endings if (path := picture.with_suffix(ending)).is_file()), None)
        text = _read_text(sidecar) if sidecar is not None else subset.class_tokens
        lines = text.strip().splitlines()
        texts[picture.name] = lines[0].strip() if lines else ""
        is_plain &= len(lines) <= 1 and (sidecar is None or sidecar.suffix == ".txt")
        is_plain &= sidecar is not None or (not subset.class_tokens and not picture.with_suffix(".txt").is_file())
    return Texts(texts, is_plain)


def _texts_of_metadata(folder: Path, metadata: Path) -> Texts:
    entries = read_entries(metadata)
    texts, is_plain = {}, True
    for picture in _pictures_below(folder):
        path = picture.relative_to(folder).as_posix()
        entry = entries.find(folder, PurePosixPath(path))
        if isinstance(entry, dict):
            caption, tags = entry.get("caption") or "", entry.get("tags") or ""
            tags = ", ".join(map(str, tags)) if isinstance(tags, list) else str(tags)
            texts[path] = ", ".join(" ".join(part.split()) for part in (str(caption), tags) if part)
            is_plain &= not caption
    return Texts(texts, is_plain)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}; kohya refuses it, too: save it as UTF-8") from None
