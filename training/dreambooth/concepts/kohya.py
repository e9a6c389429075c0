"""kohya's data sets: folders named `<repeats>_<words>`, and the TOML or JSON with [[datasets]] and subsets."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from training.config.concepts import FILEWORDS
from training.dreambooth.concepts.imported import Places, name_of_folder, pictures_in

_REPEATED = re.compile(r"(\d+)_(.*)")
_READ = frozenset(
    {"image_dir", "num_repeats", "class_tokens", "is_reg", "caption_extension", "keep_tokens", "metadata_file"}
)


def looks_like_kohya_folders(folder: Path) -> bool:
    """Tell whether a folder has at least one folder named as kohya wants them."""
    return any(_REPEATED.fullmatch(path.name) and path.is_dir() for path in folder.iterdir())


def read_kohya_folders(folder: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Return a table for each `<repeats>_<words>` folder; others, which kohya passes over silently, go to `notes`."""
    tables = []
    for path in sorted(path for path in folder.iterdir() if path.is_dir()):
        found = _REPEATED.fullmatch(path.name)
        if found is None:
            notes.append(f"{path.name}: no `<repeats>_` in front: kohya passes it over, and so does this")
            continue
        if int(found[1]) == 0:
            notes.append(f"{path.name}: 0 repeats: passed over")
            continue
        has_captions = any(picture.with_suffix(".txt").is_file() for picture in pictures_in(path))
        prompt = FILEWORDS if has_captions else found[2].strip()
        notes += [] if has_captions else [f"{path.name}: no captions: every picture is trained with {prompt!r}"]
        tables.append(
            {"name": found[2].strip() or path.name, "folder": str(path), "prompt": prompt, "repeats": int(found[1])}
        )
    return tables


def read_kohya_config(config: Mapping[str, Any], places: Places, notes: list[str]) -> list[dict[str, Any]]:
    """Return a table for each subset of a dataset config; regularisation subsets become class images."""
    tables: list[dict[str, Any]] = []
    for number, dataset in enumerate(config.get("datasets", ()), start=1):
        own = {**config.get("general", {}), **{key: value for key, value in dataset.items() if key != "subsets"}}
        subsets = dataset.get("subsets", ())
        regular = [{**own, **subset} for subset in subsets if not subset.get("is_reg")]
        classes = [{**own, **subset} for subset in subsets if subset.get("is_reg")]
        made = [_subset(subset, f"dataset {number}", places, notes) for subset in regular if "image_dir" in subset]
        if len(made) < len(regular):
            notes.append(f"dataset {number}: subsets without image_dir are for `python -m sharding import-kohya`")
        for table in made:
            if classes:
                table["class_images"] = _class_images(classes, f"dataset {number}", places, notes)
        tables += made
    return tables


def _subset(subset: Mapping[str, Any], where: str, places: Places, notes: list[str]) -> dict[str, Any]:
    folder = str(subset["image_dir"])
    table: dict[str, Any] = {"name": name_of_folder(folder), "folder": places.find(folder, notes)}
    extension = str(subset.get("caption_extension", ".caption"))
    table["caption_extension"] = extension
    if "caption_extension" not in subset:
        notes.append(f"{where}, {folder}: kohya reads captions from .caption files unless told otherwise; so does this")
    place = Path(table["folder"])
    has_captions = place.is_dir() and any(picture.with_suffix(extension).is_file() for picture in pictures_in(place))
    tokens = str(subset.get("class_tokens", ""))
    table["prompt"] = tokens if tokens and not has_captions else FILEWORDS
    if (repeats := int(subset.get("num_repeats", 1))) > 1:
        table["repeats"] = repeats
    if subset.get("keep_tokens"):
        table["keep_first_tags"] = int(subset["keep_tokens"])
    unread = sorted(subset.keys() - _READ)
    if unread:
        notes.append(f"{where}, {folder}: {', '.join(unread)}: settings of the run here, not of a concept")
    return table


def _class_images(classes: Sequence[Mapping[str, Any]], where: str, places: Places, notes: list[str]) -> dict[str, Any]:
    if len(classes) > 1:
        notes.append(f"{where}: {len(classes)} regularisation subsets; the first one is taken")
    first = classes[0]
    return {
        "folder": places.find(str(first.get("image_dir", "")), notes),
        "prompt": str(first.get("class_tokens", "")),
        "images_per_image": 1,
    }
