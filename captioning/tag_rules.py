"""Settings of tags: which ones stand in a caption, and how they are spelled.

Only settings; `lexicon` applies them to tags, `tag_stream` to pictures.
"""

import re
from typing import Literal

from pydantic import Field, model_validator

from captioning.tag_files import TagList, TagLists, TagMap
from captioning.tag_relations import all_implied, final_names
from captioning.word_rules import Comparison
from sharding.config import Config, Name

TagCategory = Literal["general", "character", "copyright", "artist", "meta"]
KAOMOJI = (
    "0_0", "(o)_(o)", "+_+", "+_-", "._.", "<o>_<o>", "<|>_<|>", "=_=", ">_<", "3_3", "6_9", ">_o", "@_@", "^_^",
    "o_o", "u_u", "x_x", "|_|", "||_||",
)  # fmt: skip
"""Faces whose underscore is a mouth. Source: the tagger author's demo."""


class BlacklistConfig(Config):
    """Tags of one category that never stand. Compared in underscore form, after `alias`."""

    tags: TagList = ()
    """Whole tags: "comic" does not hit `comic_panel`."""
    substrings: tuple[str, ...] = ()
    """Anywhere in a tag: "artifacts" also hits `jpeg_artifacts`."""
    patterns: tuple[str, ...] = ()
    """Regular expressions that match a whole tag."""

    @model_validator(mode="after")
    def _patterns_are_valid(self) -> "BlacklistConfig":
        if "" in self.substrings:
            raise ValueError("substrings: an empty one is in every tag")
        for pattern in self.patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"patterns: {pattern!r} is no regular expression: {error}") from None
        return self


class TagsConfig(Config):
    """Which tags stand in a caption, and how they are spelled. Tables of tags may be files, see tag_files."""

    tagger: str = ""
    """The tagger whose tags and rating are used; empty: only those that records came with."""
    prefer: tuple[Literal["record", "tagger"], ...] = ("record", "tagger")
    """Order of origin within a group; a tag that already stands is not repeated."""
    record_categories: tuple[TagCategory, ...] = ("general", "character", "copyright")
    """Categories of the record's own tags that are used."""
    record_only: tuple[str, ...] = ()
    """Groups to which the tagger adds nothing."""
    general_threshold: float = Field(0.35, ge=0)
    """A tag of any category but character needs this probability; above 1 gives none."""
    character_threshold: float = Field(0.50, ge=0)
    """A character tag needs this probability; above 1 gives none."""
    comparison: Comparison = ">="
    """Probabilities must be at least (">=", as kohya's tagger) or greater than (">") the threshold, as float32."""
    mcut: tuple[Literal["general", "character"], ...] = ()
    """Kinds of tags cut where a picture's sorted probabilities fall most, the thresholds above being the least that
    is needed. Source: Largeron, Moulin, Gery, "MCut", 2012."""
    order: Literal["label", "confidence"] = "label"
    """Order of a tagger's tags within a group: of its label file, or the most probable first."""
    character_tag_expand: bool = True
    """`name_(costume)_(series)` gives the character `name_(costume)` and the series `series`."""
    kohya_characters: bool = False
    """Characters stand in reverse order (a tagger's: of its labels), each followed by its series in the same group,
    as kohya's --character_tags_first --character_tag_expand write them (a series twice there stands once)."""
    given_name_first: TagList = ()
    """Character tags, without parentheses, that have the given name first: their last word moves to the front."""
    remove_underscores: bool = True
    """Underscores become spaces, but not in tags of up to three characters, nor in `keep_underscores`."""
    keep_underscores: tuple[str, ...] = KAOMOJI
    """Longer and shorter tags that keep their underscore."""
    alias: TagMap = Field(default_factory=dict)
    """Other name → name, before everything else. Where the name is itself another name, its name stands; a circle is
    an error."""
    drop_tags: TagList = ()
    """Tags that never stand in a caption, exact, in underscore form, before a character tag is expanded."""
    blacklist: dict[TagCategory, BlacklistConfig] = Field(default_factory=dict)
    """By category: tags that never stand."""
    source_blacklist: dict[Name, BlacklistConfig] = Field(default_factory=dict, max_length=62)
    """By source: tags of any category that never stand in captions of its pictures, whoever gave them."""
    implied: TagLists = Field(default_factory=dict)
    """Tag → tags that it implies; what those imply in turn is implied, too. A circle is an error."""
    implied_rule: Literal["add", "drop"] = "drop"
    """What happens to implied tags of the same category: they are added behind, or dropped as redundant."""
    drop_redundant: bool = False
    """Drop a general tag when another one of the picture ends with it, word by word, and no negation or preposition
    stands before: `skirt` under `pleated_skirt`; but not under `no_skirt`, `skirt_lift`, `sitting_on_skirt`."""
    keep_redundant: TagList = ()
    """Tags that `drop_redundant` leaves alone."""
    drop_series_of_characters: bool = False
    """Drop a series that the last parenthesis of one of the picture's characters names, as a whole or by its leading
    words: `fate` and `fate_(series)` beside `x_(fate/grand_order)`. One that says more stays: `fate/zero` beside
    `x_(fate)`."""
    drop_base_characters: bool = False
    """Drop a character tag when another of the picture is the same with further parentheses: `miku` and
    `miku_(vocaloid)` under `miku_(append)_(vocaloid)`."""
    compression_artifacts_bytes: int = Field(0, ge=0)
    """Files smaller than this, PNG and JPEG XL aside, get the general tag `compression_artifacts`; 0: none."""

    @model_validator(mode="after")
    def _tables_have_an_end(self) -> "TagsConfig":
        try:
            names = final_names(self.alias)
        except ValueError as error:
            raise ValueError(f"alias: {error}") from None
        try:
            all_implied(self.implied, names)
        except ValueError as error:
            raise ValueError(f"implied: {error}") from None
        return self
