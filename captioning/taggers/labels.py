"""Label files of taggers: `selected_tags.csv`, `tag_mapping.json`, `tags.txt`. Line or index = output of the model."""

import csv
import json
from pathlib import Path

from captioning.plugin import ModelError
from captioning.taggers.base import Label

CATEGORIES = {"0": "general", "1": "artist", "3": "copyright", "4": "character", "5": "meta", "9": "rating"}
"""Danbooru's numbers; 9 is the taggers' own."""
_MAPPING_CATEGORIES = ("rating", "general", "character", "copyright", "meta", "model", "quality", "artist")


def read_selected_tags(path: Path) -> list[Label]:
    """Read selected_tags.csv (name, category, and columns that are not read). Raises ModelError.

    The csv module, not a table reader: tags such as `null` or `nan` are words.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            rows = list(csv.DictReader(stream))
    except FileNotFoundError:
        raise ModelError(f"{path}: missing; it names the outputs of the model beside it") from None
    if not rows or "name" not in rows[0] or "category" not in rows[0]:
        raise ModelError(f"{path}: expected the columns tag_id, name, category, count")
    unknown = sorted({str(row["category"]) for row in rows} - set(CATEGORIES))
    if unknown:
        raise ModelError(f"{path}: unknown tag category {unknown[0]!r}; known: {', '.join(CATEGORIES)}")
    return [Label(row["name"], CATEGORIES[row["category"]]) for row in rows]


def read_tag_mapping(path: Path) -> list[Label]:
    """Read tag_mapping.json: {index: {tag, category}}, or {idx_to_tag, tag_to_category}. Raises ModelError.

    An index that the file leaves out becomes a label that is no tag.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if "idx_to_tag" in values:
            categories = values["tag_to_category"]
            found = {int(index): (tag, categories[tag]) for index, tag in values["idx_to_tag"].items()}
        else:
            found = {int(index): (it["tag"], it["category"]) for index, it in values.items()}
        labels = {index: Label(tag, category.lower()) for index, (tag, category) in found.items()}
    except FileNotFoundError:
        raise ModelError(f"{path}: missing; it names the outputs of the model beside it") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path}: not a tag mapping ({error!r})") from error
    unknown = sorted({label.category for label in labels.values()} - set(_MAPPING_CATEGORIES))
    if not labels or unknown:
        what = f"unknown tag category {unknown[0]!r}" if unknown else "no labels"
        raise ModelError(f"{path}: {what}; known: {', '.join(_MAPPING_CATEGORIES)}")
    return [labels.get(index, Label("", "")) for index in range(max(labels) + 1)]


def read_lines(path: Path) -> list[str]:
    """Read one tag per line, without empty lines. Raises ModelError."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except FileNotFoundError:
        raise ModelError(f"{path}: missing; it names the outputs of the model beside it") from None
    return [line for line in lines if line]
