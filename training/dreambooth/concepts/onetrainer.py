"""OneTrainer's concepts.json: a list of objects with path, text and image tables."""

from collections.abc import Mapping, Sequence
from typing import Any

from training.config.concepts import FILEWORDS
from training.dreambooth.concepts.imported import Places, name_of_folder

_READ = frozenset(
    {"name", "path", "enabled", "type", "loss_weight", "balancing", "balancing_strategy", "text", "image"}
)
_READ |= {"include_subdirectories", "image_variations", "text_variations", "seed", "concept_stats", "__version"}


def looks_like_onetrainer(objects: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether the objects have OneTrainer's path and text."""
    return bool(objects) and all("path" in one and isinstance(one.get("text", {}), Mapping) for one in objects)


def read_onetrainer(objects: Sequence[Mapping[str, Any]], places: Places, notes: list[str]) -> list[dict[str, Any]]:
    """Return our tables of OneTrainer's objects; disabled ones and what has no meaning here go to `notes`."""
    tables = []
    for number, given in enumerate(objects, start=1):
        where, kind = f"concept {number}", str(given.get("type", "STANDARD"))
        name = str(given.get("name") or name_of_folder(str(given["path"])))
        if not given.get("enabled", True):
            notes.append(f"{where} ({name}): disabled there: passed over")
            continue
        if kind != "STANDARD":
            hint = {
                "VALIDATION": "set validation.chunk to held-out pictures instead",
                "PRIOR_PREDICTION": "give its folder as class_images.folder of a concept",
            }.get(kind, "unknown here")
            notes.append(f"{where} ({name}): type {kind}: passed over; {hint}")
            continue
        table: dict[str, Any] = {"name": name, "folder": places.find(str(given["path"]), notes)}
        table["prompt"] = _prompt(given.get("text", {}), where, name, notes)
        if (weight := given.get("loss_weight", 1.0)) != 1.0:
            table["loss_weight"] = weight
        table["repeats"] = _repeats(given, where, notes)
        for key in sorted(given.keys() - _READ):
            notes.append(f"{where} ({name}): {key} has no meaning here: passed over")
        tables.append(table)
    return tables


def _prompt(text: Mapping[str, Any], where: str, name: str, notes: list[str]) -> str:
    source = str(text.get("prompt_source", "sample"))
    if source == "concept":
        notes.append(
            f"{where} ({name}): prompts come from the file {text.get('prompt_path', '')!r} there; here a concept has "
            f"one prompt: its name is taken, edit `prompt`"
        )
        return name
    if source == "filename":
        notes.append(f"{where} ({name}): file names are prompts there; here captions are read from .txt files")
    return FILEWORDS


def _repeats(given: Mapping[str, Any], where: str, notes: list[str]) -> int:
    balancing, strategy = given.get("balancing", 1.0), str(given.get("balancing_strategy", "REPEATS"))
    if strategy != "REPEATS":
        notes.append(f"{where}: balancing by {strategy} {balancing}: every picture is shown once here; use `repeats`")
        return 1
    repeats = max(1, round(float(balancing)))
    if repeats != balancing:
        notes.append(f"{where}: balancing {balancing} repeats: {repeats} is the nearest whole number")
    return repeats
