"""The concepts list of d8ahazard's DreamBooth extension: 18 keys a concept, alone or inside db_config.json."""

import difflib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from training.config.concepts import FILEWORDS
from training.dreambooth.concepts.imported import Places, name_of_folder, pictures_in

KEYS: Mapping[str, str] = {
    "instance_data_dir": "folder",
    "instance_prompt": "prompt",
    "instance_token": "token",
    "class_data_dir": "class_images.folder",
    "class_prompt": "class_images.prompt",
    "class_token": "class_images.token",
    "class_negative_prompt": "class_images.negative",
    "class_guidance_scale": "class_images.guidance",
    "class_infer_steps": "class_images.steps",
    "num_class_images_per": "class_images.images_per_image",
    "save_sample_prompt": "sample.prompt",
    "save_sample_negative_prompt": "sample.negative",
    "save_sample_template": "sample.template",
    "n_save_sample": "sample.images",
    "sample_seed": "sample.seed",
    "save_guidance_scale": "sample.guidance",
    "save_infer_steps": "sample.steps",
    "is_valid": "",  # worked out from the folder there, whatever the file says
}
"""Their key → ours; "" means nothing here."""
_ALIASES = {"num_repeats": "repeats", "repeats": "repeats", "name": "name", "caption_extension": "caption_extension"}
_PATHS = frozenset({"instance_data_dir", "class_data_dir", "save_sample_template"})
_WHOLE = frozenset({"class_infer_steps", "num_class_images_per", "n_save_sample", "sample_seed", "save_infer_steps"})
_NUMBERS = _WHOLE | {"class_guidance_scale", "save_guidance_scale"}


def is_path_key(key: str) -> bool:
    """Tell whether a key's value is a path, as the lenient reader asks."""
    return key in _PATHS or key.endswith(("_dir", "_path")) or key == "path"


def looks_like_extension(objects: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether any object has a key of the extension's."""
    return any(set(one) & (KEYS.keys() - {"is_valid"}) for one in objects)


def read_extension(objects: Sequence[Mapping[str, Any]], places: Places, notes: list[str]) -> list[dict[str, Any]]:
    """Return our tables of the extension's objects; what is odd goes to `notes`."""
    tables = []
    for number, given in enumerate(objects, start=1):
        if table := _table(given, f"concept {number}", places, notes):
            tables.append(table)
    return tables


def _table(given: Mapping[str, Any], where: str, places: Places, notes: list[str]) -> dict[str, Any] | None:
    table: dict[str, Any] = {}
    for key, value in given.items():
        ours = KEYS.get(key, _ALIASES.get(key))
        if ours is None:
            if key != "num_class_images":
                near = difflib.get_close_matches(key, KEYS, n=1)
                notes.append(f"{where}: unknown key {key!r}{f', meant {near[0]}?' if near else ''}: passed over")
            continue
        if ours and value not in (None, ""):
            _put(table, ours, _as_number(value, f"{where}: {key}", notes) if key in _NUMBERS else value)
    if not (folder := str(table.get("folder", ""))):
        notes.append(f"{where}: no instance_data_dir: passed over, as the extension would")
        return None
    table["folder"] = places.find(folder, notes)
    table.setdefault("name", name_of_folder(folder))
    if not table.get("prompt"):
        notes.append(f"{where}: no instance_prompt: {FILEWORDS} is taken, the caption beside the picture")
    made = table.get("class_images", {})
    for place, key in ((made, "folder"), (table.get("sample", {}), "template")):
        if key in place:
            place[key] = places.find(str(place[key]), notes)
    if "num_class_images" in given and "num_class_images_per" not in given:
        _put(table, "class_images.images_per_image", _per_image(given["num_class_images"], table, where, notes))
    return table


def _put(table: dict[str, Any], key: str, value: Any) -> None:
    *tables, name = key.split(".")
    for part in tables:
        table = table.setdefault(part, {})
    table[name] = value


def _as_number(value: Any, where: str, notes: list[str]) -> Any:
    """Return numbers that stand in quotes as numbers, and whole ones as such; anything else as it is."""
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            return value
        notes.append(f"{where}: {value!r} in quotes is read as a number")
        return int(number) if number.is_integer() else number
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _per_image(total: Any, table: Mapping[str, Any], where: str, notes: list[str]) -> int:
    """Return class images per image for a total, as older versions and diffusers count them."""
    total = _as_number(total, f"{where}: num_class_images", notes)
    folder = Path(table["folder"])
    num_pictures = len(pictures_in(folder)) if folder.is_dir() else 0
    per_image = math.ceil(int(total) / num_pictures) if num_pictures else 0
    notes.append(
        f"{where}: num_class_images {total} is a total: with {num_pictures} pictures {per_image} for each"
        + ("" if num_pictures else "; set class_images.images_per_image by hand")
    )
    return per_image
