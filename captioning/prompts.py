"""What a captioner is asked about one picture: a template, and what is known of the picture to fill it in.

Hints come from the record or from what a tagger has said; a picture without any is asked with `without_hints`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import pyarrow as pa

from captioning.spelling import spell_tag
from captioning.tag_rules import KAOMOJI

RECORD = "record"
PLACEHOLDERS = ("tags", "characters", "series", "artists", "rating")
_CATEGORIES = {"tags": "general", "characters": "character", "series": "copyright", "artists": "artist"}
_FACES = frozenset(KAOMOJI)
_RATINGS = ("general", "sensitive", "questionable", "explicit")


@dataclass(frozen=True)
class Prompt:
    """Template and where its hints are from. All of it is part of the identity of what is said."""

    template: str
    """Words with {tags}, {characters}, {series}, {artists}, {rating}."""
    without_hints: str = ""
    """Asked instead when nothing that the template names is known of a picture; empty: the template without it."""
    hints: str = ""
    """`record`, the name of a tagger, or empty when the template names nothing."""
    threshold: float = 0.35
    """Probability that a tagger's tag must have, for characters `character_threshold`."""
    character_threshold: float = 0.5
    most_tags: int = 30
    """So many general tags at most: a tagger's most probable, a record's first."""

    @property
    def identity(self) -> list[object]:
        """All that decides what is asked, but for what the hints are."""
        return list(astuple(self))

    @property
    def names(self) -> tuple[str, ...]:
        """The placeholders that stand in the template."""
        return tuple(name for name in PLACEHOLDERS if f"{{{name}}}" in self.template)

    @property
    def tagger(self) -> str:
        """The tagger whose rows are needed; empty: none."""
        return "" if self.hints == RECORD else self.hints

    @property
    def record_columns(self) -> tuple[str, ...]:
        """Columns of the record that are needed."""
        if self.hints != RECORD:
            return ()
        return tuple("rating" if name == "rating" else f"tags_{_CATEGORIES[name]}" for name in self.names)

    def of_record(self, record: Mapping[str, Any]) -> str:
        """Return the text for a picture of which only its record is asked."""
        if self.hints != RECORD:
            return self.template
        words = {name: record[f"tags_{_CATEGORIES[name]}"] or [] for name in self.names if name != "rating"}
        return self._fill(words, record["rating"] or "" if "rating" in self.names else "")

    def of_tagger(self, row: Mapping[str, Any], labels: pa.Table) -> str:
        """Return the text for a picture with a tagger's row; labels: schema.LABELS."""
        names, categories = labels.column("name"), labels.column("category")
        words: dict[str, list[str]] = {name: [] for name in self.names if name != "rating"}
        by_probability = sorted(zip(row["tag_probs"], row["tag_ids"], strict=True), key=lambda it: (-it[0], it[1]))
        for probability, tag_id in by_probability:
            category = categories[tag_id].as_py()
            if probability < (self.character_threshold if category == "character" else self.threshold):
                continue
            for name in words:
                if _CATEGORIES[name] == category:
                    words[name].append(names[tag_id].as_py())
        probs = row["rating_probs"]
        return self._fill(words, _RATINGS[probs.index(max(probs))] if probs and "rating" in self.names else "")

    def _fill(self, words: Mapping[str, Sequence[str]], rating: str) -> str:
        values = {
            name: ", ".join(map(_spell, found[: self.most_tags] if name == "tags" else found))
            for name, found in words.items()
        } | {"rating": rating}
        if self.without_hints and not any(values.values()):
            return self.without_hints
        text = self.template
        for name, value in values.items():
            text = text.replace(f"{{{name}}}", value)
        return text


def _spell(tag: str) -> str:
    return spell_tag(tag, remove_underscores=True, keep_underscores=_FACES)
