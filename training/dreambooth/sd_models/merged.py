"""Whether a base is a merge of other models, which the wiki advises against training on: "Frankenstein" models.

Said by files of today (ModelSpec, A1111's merger, a model card); guessed from a name otherwise. Nothing is refused.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training.dreambooth.sd_models.models import SdModel
from training.stage_c.model_card import read_front_matter

_NAMES = {
    "merge": re.compile(r"(?<![a-z])(?:super)?merged?(?![a-z])", re.IGNORECASE),
    "mix": re.compile(r"mix(?=$|[^a-z]|v\d)", re.IGNORECASE),
    "blend": re.compile(r"(?<![a-z])blend(?:ed)?(?![a-z])", re.IGNORECASE),
    "frankenstein": re.compile(r"franken(?:stein|merge)?", re.IGNORECASE),
    "a sum of models": re.compile(r"\d(?:\.\d+)?\s*\([^)]+\)\s*\+|\([^)]+\)\s*[+-]\s*\(|\s\+\s"),
}
"""What mergers call their files: A1111's `0.5(a) + 0.5(b)`, people's `OrangeMix2`."""
_SHOWN = 200


def merged_from(model: SdModel) -> str | None:
    """Return what says that a model is a merge, as a half sentence to be printed; None when nothing does."""
    return _said_by_file(model.metadata) or _said_by_card(Path(model.name)) or _said_by_name(model)


def _said_by_file(metadata: Mapping[str, str]) -> str | None:
    if parents := metadata.get("modelspec.merged_from"):
        return f"its header says that it was merged from {parents[:_SHOWN]}"
    if models := metadata.get("sd_merge_models"):
        named = ", ".join(_names_in(models))
        return f"A1111's merger made it{f' of {named[:_SHOWN]}' if named else ''}"
    if metadata.get("sd_merge_recipe"):
        return "a merger's recipe is in its header"
    return None


def _names_in(models: str) -> list[str]:
    """Return the names in A1111's list of merged models: JSON, by hash. One that cannot be read names none."""
    try:
        values = json.loads(models)
    except json.JSONDecodeError:
        return []
    entries: list[Any] = list(values.values()) if isinstance(values, dict) else []
    return [str(one["name"]) for one in entries if isinstance(one, dict) and "name" in one]


def _said_by_card(folder: Path) -> str | None:
    card = read_front_matter(folder / "README.md") if folder.is_dir() else {}
    if card.get("base_model_relation") == "merge" or "merge" in (card.get("tags") or ()):
        return "its README says that it is a merge"
    parents = card.get("base_model")
    if isinstance(parents, list) and len(parents) > 1:
        return f"its README names several bases: {', '.join(map(str, parents))[:_SHOWN]}"
    return None


def _said_by_name(model: SdModel) -> str | None:
    name = model.source.stem if model.source is not None else Path(model.name).name
    found = next((word for word, pattern in _NAMES.items() if pattern.search(name)), None)
    return None if found is None else f"its name {name!r} looks like {found}"
