"""The `policies` table of a dataset.toml: how raw numbers and tags become captions.

Only settings; `compose` applies them. Changing a policy never runs a model.
"""

import re
from itertools import pairwise
from string import Formatter
from typing import Literal

from pydantic import Field, model_validator

from captioning.sentences import SentencesConfig
from captioning.tag_files import TagList, TagLists, TagMap
from sharding.config import Config, Name
from sharding.schema import RATINGS

Comparison = Literal[">", ">="]
TagCategory = Literal["general", "character", "copyright", "artist", "meta"]

FIXED_GROUPS = (
    "first", "date", "year", "style", "custom", "rating", "count", "character", "series", "artist", "medium", "meta",
    "rest",
)  # fmt: skip
"""Groups of words that every policy may order; each table of tiers and of tag_groups adds one under its own name."""
TAG_TEMPLATE_FIELD = "{tag}"
KAOMOJI = (
    "0_0", "(o)_(o)", "+_+", "+_-", "._.", "<o>_<o>", "<|>_<|>", "=_=", ">_<", "3_3", "6_9", ">_o", "@_@", "^_^",
    "o_o", "u_u", "x_x", "|_|", "||_||",
)  # fmt: skip
"""Faces whose underscore is a mouth. Source: the tagger author's demo."""


class VotesConfig(Config):
    """Thresholds for what people on a board thought of a picture, by its rating: one per step of the tiers."""

    fields: tuple[str, ...] = Field(("fav_count", "score"), min_length=1)
    """Keys of the record's `custom` map, the first one that holds a number counts."""
    general: tuple[float, ...]
    """For pictures rated general, highest first."""
    sensitive: tuple[float, ...]
    """For sensitive ones."""
    questionable: tuple[float, ...]
    """For questionable ones."""
    explicit: tuple[float, ...]
    """For explicit ones. A picture without a rating gets no word by votes."""

    @property
    def thresholds(self) -> tuple[tuple[float, ...], ...]:
        """In the order of schema.RATINGS."""
        return tuple(getattr(self, rating) for rating in RATINGS)


class TierConfig(Config):
    """A table of thresholds that turns a score, several summed ones, or votes into one word."""

    model: str = ""
    """The scorer; empty only with `votes`."""
    comparison: Comparison
    """A word is given for a score greater than (">") or at least (">=") its threshold; compared as float32."""
    steps: tuple[tuple[float, str], ...] = Field(min_length=1)
    """[threshold, word], highest first."""
    rest: str = ""
    """Word for scores below all thresholds; none if empty. Never given for a missing score."""
    also: dict[Name, tuple[float, ...]] = Field(default_factory=dict)
    """Further scorers, each with one threshold per step, highest first. The sum of the scores that a picture has is
    compared with the sum of just their thresholds; pictures with some but not all of them are counted."""
    votes: VotesConfig | None = None
    """If given, the higher one of the score's word and the votes' word is used."""

    @property
    def models(self) -> tuple[str, ...]:
        """All scorers."""
        return tuple(name for name in (self.model, *self.also) if name)

    @model_validator(mode="after")
    def _steps_descend(self) -> "TierConfig":
        for (higher, word), (lower, other) in pairwise(self.steps):
            if not higher > lower:
                raise ValueError(f"steps: {word!r} at {higher} must be above {other!r} at {lower}")
        tables = {f"also.{name}": thresholds for name, thresholds in self.also.items()}
        if self.votes is not None:
            tables |= {f"votes.{name}": it for name, it in zip(RATINGS, self.votes.thresholds, strict=True)}
        for name, thresholds in tables.items():
            if len(thresholds) != len(self.steps):
                raise ValueError(f"{name}: {len(thresholds)} thresholds for {len(self.steps)} steps")
            if any(higher <= lower for higher, lower in pairwise(thresholds)):
                raise ValueError(f"{name}: thresholds must descend, got {', '.join(map(str, thresholds))}")
        if not self.model and (self.votes is None or self.also):
            raise ValueError("model: required, unless `votes` alone gives the words")
        return self


class DateWordsConfig(Config):
    """Words for a picture's date: the name of its period in the group date, its year in the group year."""

    model: str = ""
    """The scorer that gives the year; empty: the record's own date."""
    sources: tuple[Name, ...] = ()
    """Only pictures of these sources get the words; empty: all."""
    year: str = "year {year}"
    """The word of the group year."""


class StyleWordsConfig(Config):
    """The group style: one "1990s (style)" for a picture that looks older than it is.

    The tag `NNNNs_(style)` of a picture, or else the model's decade, stands when its decade lies before the year's.
    The model's also when the year is 2015 … 2019 and the style's is before 2015. Without a year there is none.
    """

    model: str = ""
    """A scorer that gives the first year of a decade (`style_age`); empty: only tags."""


class RatingWordsConfig(Config):
    """The word for a picture's rating."""

    prefer: tuple[Literal["tagger", "record"], ...] = ("tagger", "record")
    """Whose rating counts, first one that has any: the tagger's most probable, or the one the record came with."""
    general: str = "general"
    """Word for the rating general; empty gives none, as below."""
    sensitive: str = "sensitive"
    """Word for sensitive."""
    questionable: str = "nsfw"
    """Word for questionable."""
    explicit: str = "explicit nsfw"
    """Word for explicit."""

    @property
    def words(self) -> tuple[str, ...]:
        """The words in the order of schema.RATINGS."""
        return tuple(getattr(self, rating) for rating in RATINGS)


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
    """Other name → name, before everything else. What a name is itself an alias of is not
    looked up: give the final name."""
    drop_tags: TagList = ()
    """Tags that never stand in a caption, exact, in underscore form, before a character tag is expanded."""
    blacklist: dict[TagCategory, BlacklistConfig] = Field(default_factory=dict)
    """By category: tags that never stand."""
    implied: TagLists = Field(default_factory=dict)
    """Tag → tags that it implies."""
    implied_rule: Literal["add", "drop"] = "drop"
    """What happens to implied tags of the same category: they are added behind, or dropped as redundant."""
    drop_redundant: bool = False
    """Drop a general tag when another one of the picture ends with it, word by word, and no negation or preposition
    stands before: `skirt` under `pleated_skirt`; but not under `no_skirt`, `skirt_lift`, `sitting_on_skirt`."""
    keep_redundant: TagList = ()
    """Tags that `drop_redundant` leaves alone."""
    drop_series_of_characters: bool = False
    """Drop a series that stands in the parentheses of one of the picture's character tags."""
    compression_artifacts_bytes: int = Field(0, ge=0)
    """Files smaller than this, PNG and JPEG XL aside, get the general tag `compression_artifacts`; 0: none."""


class TokensConfig(Config):
    """The length of a caption in tokens of a CLIP text encoder."""

    max_tokens: int = Field(0, ge=0)
    """Longest caption, without begin and end token (75 per window); 0: no limit."""
    tokenizer: str = "training/stage_c/clip_bpe/bpe_simple_vocab_16e6.txt.gz"
    """OpenAI's vocabulary file, a folder with tokenizer.json or vocab.json and merges.txt, or a hub id."""
    cut_first: tuple[str, ...] = ()
    """Groups whose words go first, then the other groups, the last one first; within a group the last word first."""


class PolicyConfig(Config):
    """Which words a caption is made of, and in which order."""

    groups: tuple[str, ...] = Field(min_length=1)
    """Order of the groups of words: names of `tiers` and `tag_groups`, and of first, date, year, style, custom,
    rating, count, character, series, artist, medium, meta, rest. Tags of a group that is not listed go to rest (media
    to meta), and nowhere without it; a word that already stands is not repeated."""
    tiers: dict[Name, TierConfig] = Field(default_factory=dict)
    """Tables of thresholds by the name of their group."""
    date: DateWordsConfig = DateWordsConfig()
    """Which pictures get their period or year as a word."""
    style: StyleWordsConfig = StyleWordsConfig()
    """The decade that a picture imitates."""
    custom: dict[Name, str] = Field(default_factory=dict)
    """By source: words with {artist_name} and other keys of the record's `custom` map, {period}, {year}, {dataset} or
    {source}; of words separated by commas those are left out whose fields are unknown for a picture."""
    rating: RatingWordsConfig = RatingWordsConfig()
    """Words for ratings."""
    tags: TagsConfig = TagsConfig()
    """Tags of the tagger and of the record."""
    tag_groups: TagLists = Field(default_factory=dict)
    """Group → general tags that belong to it, `*` standing for anything; exact names go before patterns, the first
    group wins. "wiki_character" comes with the package."""
    templates: dict[str, str] = Field(default_factory=dict)
    """By group of tags: the word, with {tag} for the spelled tag: artist = "art by {tag}"."""
    replace: TagMap = Field(default_factory=dict)
    """Word → word, as they stand in captions, of any group; "" drops it."""
    first_words: TagList = ()
    """Words that stand in the group `first`, in this order, whatever their group would be."""
    characters: dict[Name, str] = Field(default_factory=dict)
    """By source: a character tag that all its pictures get."""
    traits: TagLists = Field(default_factory=dict)
    """Character tag → general tags that its name shall carry: they are dropped where the character is.
    `python -m captioning traits` measures such a table."""
    tokens: TokensConfig = TokensConfig()
    """How long captions may be."""
    sentences: SentencesConfig = SentencesConfig()
    """Whether what a captioner said stands in captions."""
    warn_above_tags: int = Field(0, ge=0)
    """Captions with more words are counted and reported; 0: not."""

    @property
    def scorers(self) -> dict[str, str]:
        """The scorers that are needed, by the setting that names them."""
        named = {
            f"tiers.{tier}.{'model' if model == table.model else f'also.{model}'}": model
            for tier, table in self.tiers.items()
            for model in table.models
        }
        named |= {"date.model": self.date.model} if self.date.model else {}
        return named | ({"style.model": self.style.model} if self.style.model else {})

    @model_validator(mode="after")
    def _groups_are_known(self) -> "PolicyConfig":
        known = (*self.tiers, *self.tag_groups, *FIXED_GROUPS)
        self._check_groups("groups", self.groups, known)
        for kind, names in (("tiers", self.tiers), ("tag_groups", self.tag_groups)):
            if clash := [name for name in names if name in FIXED_GROUPS]:
                raise ValueError(f"{kind}.{clash[0]}: the name of another group; known: {', '.join(FIXED_GROUPS)}")
        if both := [name for name in self.tiers if name in self.tag_groups]:
            raise ValueError(f"tiers.{both[0]}: tag_groups has a group of this name")
        for tier in self.tiers:
            if tier not in self.groups:
                raise ValueError(f"tiers.{tier}: missing in groups, so its words would stand nowhere")
        for name, value in (("custom", self.custom), ("first", self.first_words), ("style", self.style.model)):
            if value and name not in self.groups:
                setting = {"first": "first_words", "style": "style.model"}.get(name, name)
                raise ValueError(f"{setting}: groups lacks {name!r}, so its words would stand nowhere")
        self._check_groups("templates", tuple(self.templates), known)
        self._check_groups("tags.record_only", self.tags.record_only, known)
        self._check_groups("tokens.cut_first", self.tokens.cut_first, self.groups)
        for group, template in self.templates.items():
            if TAG_TEMPLATE_FIELD not in template or "," in template:
                raise ValueError(f"templates.{group}: needs {TAG_TEMPLATE_FIELD} and no comma, got {template!r}")
        return self

    @model_validator(mode="after")
    def _templates_have_known_fields(self) -> "PolicyConfig":
        for source, template in self.custom.items():
            try:
                fields = template_fields(template)
            except ValueError as error:
                raise ValueError(f"custom.{source}: {error} in {template!r}") from None
            if bad := [name for name in fields if not name.isidentifier()]:
                raise ValueError(f"custom.{source}: {{{bad[0]}}} is not the name of a field in {template!r}")
        for word, other in self.replace.items():
            if "," in other:
                raise ValueError(f"replace.{word}: {other!r} has a comma, which would make two words of it")
        if self.date.year.replace("{year}", "").strip("{}") != self.date.year.replace("{year}", ""):
            raise ValueError(f"date.year: only {{year}} can stand in braces, got {self.date.year!r}")
        return self

    def _check_groups(self, setting: str, groups: tuple[str, ...], known: tuple[str, ...]) -> None:
        for group in groups:
            if group not in known:
                raise ValueError(f"{setting}: unknown group {group!r}; known: {', '.join(known)}")
        if len(set(groups)) != len(groups):
            raise ValueError(f"{setting}: a group stands twice in {', '.join(groups)}")


def template_fields(template: str) -> list[str]:
    """Return the names in braces of a custom template, in order. Raises ValueError for unbalanced braces."""
    return [field for _, field, _, _ in Formatter().parse(template) if field is not None]
