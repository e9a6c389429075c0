"""Captioning's two tables of a dataset.toml: the models that annotate, and the policies that make captions.

`annotate` says which models look at each image and stores raw numbers; `policies` turn numbers and tags into words.
Changing a policy never runs a model.
"""

from itertools import pairwise
from string import Formatter
from typing import Literal

from pydantic import Field, model_validator

from captioning.plugin import Device
from captioning.registry import ModelConfig
from captioning.taggers.base import TaggerSettings
from sharding.config import Config, DatasetConfig, Name
from sharding.schema import RATINGS

Comparison = Literal[">", ">="]
TagCategory = Literal["general", "character", "copyright", "artist", "meta"]

FIXED_GROUPS = ("date", "custom", "rating", "character", "series", "artist", "meta", "rest")
"""Groups of words that every policy may order; each table of tiers adds one under its own name."""
KAOMOJI = (
    "0_0", "(o)_(o)", "+_+", "+_-", "._.", "<o>_<o>", "<|>_<|>", "=_=", ">_<", "3_3", "6_9", ">_o", "@_@", "^_^",
    "o_o", "u_u", "x_x", "|_|", "||_||",
)  # fmt: skip
"""Faces whose underscore is a mouth. Source: the tagger author's demo."""


class AnnotateConfig(Config):
    """What looks at each image, and on which device."""

    device: Device = "cpu"
    """Where the models run: cpu, cuda, rocm, migraphx or openvino (Intel). A device that is not there is an error."""
    batch_size: int = Field(4, gt=0)
    """Images per call of a model; the last batch of a part is filled up, so rows do not depend on its length."""
    workers: int | None = Field(None, ge=0)
    """Decode processes; 0 decodes in a thread of the main process; without a value one per core."""
    min_side: int | None = Field(None, gt=0)
    """If given, JPEGs are decoded at the smallest DCT scale (1/2, 1/4, 1/8) that leaves this many pixels to the
    shorter side. Several times faster with camera-size pictures; scores move a little. Without a value every pixel is
    decoded, as the authors of the models do."""
    models: dict[Name, ModelConfig] = Field(default_factory=dict)
    """By name; annotations/<name>/ holds what each one said. `kind` selects the plug-in."""


class TierConfig(Config):
    """A table of thresholds that turns one score into one word."""

    model: Name
    """The scorer."""
    comparison: Comparison
    """A word is given for a score greater than (">") or at least (">=") its threshold; compared as float32."""
    steps: tuple[tuple[float, str], ...] = Field(min_length=1)
    """[threshold, word], highest first."""
    rest: str = ""
    """Word for scores below all thresholds; none if empty. Never given for a missing score."""

    @model_validator(mode="after")
    def _steps_descend(self) -> "TierConfig":
        for (higher, word), (lower, other) in pairwise(self.steps):
            if not higher > lower:
                raise ValueError(f"steps: {word!r} at {higher} must be above {other!r} at {lower}")
        return self


class DateWordsConfig(Config):
    """The word for a picture's date: the name of its period."""

    model: str = ""
    """The scorer that gives the year; empty: the record's own date."""
    sources: tuple[Name, ...] = ()
    """Only pictures of these sources get the word; empty: all."""


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


class TagsConfig(Config):
    """Which tags stand in a caption, and how they are spelled."""

    tagger: str = ""
    """The tagger whose tags and rating are used; empty: only those that records came with."""
    prefer: tuple[Literal["record", "tagger"], ...] = ("record", "tagger")
    """Order of origin within a group; a tag that already stands is not repeated."""
    record_categories: tuple[TagCategory, ...] = ("general", "character", "copyright")
    """Categories of the record's own tags that are used."""
    general_threshold: float = Field(0.35, ge=0)
    """A tag of any category but character needs this probability; above 1 gives none."""
    character_threshold: float = Field(0.50, ge=0)
    """A character tag needs this probability; above 1 gives none."""
    comparison: Comparison = ">="
    """Probabilities must be at least (">=", as kohya's tagger) or greater than (">") the threshold, as float32."""
    character_tag_expand: bool = True
    """`name_(costume)_(series)` gives the character `name_(costume)` and the series `series`."""
    remove_underscores: bool = True
    """Underscores become spaces, but not in tags of up to three characters, nor in `keep_underscores`."""
    keep_underscores: tuple[str, ...] = KAOMOJI
    """Longer and shorter tags that keep their underscore."""
    drop_tags: tuple[str, ...] = ()
    """Tags that never stand in a caption, exact, in underscore form, before a character tag is expanded."""


class PolicyConfig(Config):
    """Which words a caption is made of, and in which order."""

    groups: tuple[str, ...] = Field(min_length=1)
    """Order of the groups of words: names of `tiers`, and of date, custom, rating, character, series, artist, meta,
    rest. A category of tags without its group goes to rest; a word that already stands is not repeated."""
    tiers: dict[Name, TierConfig] = Field(default_factory=dict)
    """Tables of thresholds by the name of their group."""
    date: DateWordsConfig = DateWordsConfig()
    """Which pictures get their period as a word."""
    custom: dict[Name, str] = Field(default_factory=dict)
    """By source: words with {artist_name} and other keys of the record's `custom` map, {period}, {year}, {dataset} or
    {source}; of words separated by commas those are left out whose fields are unknown for a picture."""
    rating: RatingWordsConfig = RatingWordsConfig()
    """Words for ratings."""
    tags: TagsConfig = TagsConfig()
    """Tags of the tagger and of the record."""

    @model_validator(mode="after")
    def _groups_are_known(self) -> "PolicyConfig":
        known = (*self.tiers, *FIXED_GROUPS)
        for group in self.groups:
            if group not in known:
                raise ValueError(f"groups: unknown group {group!r}; known: {', '.join(known)}")
        if len(set(self.groups)) != len(self.groups):
            raise ValueError(f"groups: a group stands twice in {', '.join(self.groups)}")
        for tier in self.tiers:
            if tier in FIXED_GROUPS:
                raise ValueError(f"tiers.{tier}: the name of another group; known: {', '.join(FIXED_GROUPS)}")
            if tier not in self.groups:
                raise ValueError(f"tiers.{tier}: missing in groups, so its words would stand nowhere")
        if self.custom and "custom" not in self.groups:
            raise ValueError("custom: groups lacks 'custom', so its words would stand nowhere")
        for source, template in self.custom.items():
            try:
                fields = template_fields(template)
            except ValueError as error:
                raise ValueError(f"custom.{source}: {error} in {template!r}") from None
            if bad := [name for name in fields if not name.isidentifier()]:
                raise ValueError(f"custom.{source}: {{{bad[0]}}} is not the name of a field in {template!r}")
        return self


class CaptioningConfig(DatasetConfig):
    """A dataset.toml with captioning's tables checked."""

    annotate: AnnotateConfig = AnnotateConfig()  # type: ignore[assignment]
    """Models that look at each image."""
    policies: dict[Name, PolicyConfig] = Field(default_factory=dict)  # type: ignore[assignment]
    """What turns raw numbers into captions, by name; `pack.policy` names the one that goes into chunks."""

    @model_validator(mode="after")
    def _names_refer_to_something(self) -> "CaptioningConfig":
        models = self.annotate.models
        taggers = {name: it for name, it in models.items() if isinstance(it, TaggerSettings)}
        scorers = [name for name in models if name not in taggers]
        for name, policy in self.policies.items():
            where = f"policies.{name}"
            wanted = {f"tiers.{tier}.model": table.model for tier, table in policy.tiers.items()}
            wanted |= {"date.model": policy.date.model} if policy.date.model else {}
            for key, model in wanted.items():
                if model not in scorers:
                    raise ValueError(f"{where}.{key}: {model!r} is no scorer of annotate.models: {', '.join(scorers)}")
            if policy.tags.tagger:
                tagger = taggers.get(policy.tags.tagger)
                if tagger is None:
                    raise ValueError(
                        f"{where}.tags.tagger: {policy.tags.tagger!r} is no tagger of annotate.models: "
                        f"{', '.join(taggers)}"
                    )
                if min(policy.tags.general_threshold, policy.tags.character_threshold) < tagger.floor:
                    raise ValueError(
                        f"{where}.tags: a threshold is below annotate.models.{policy.tags.tagger}.floor = "
                        f"{tagger.floor}; lower probabilities are not stored"
                    )
            for key, sources in (("custom", tuple(policy.custom)), ("date.sources", policy.date.sources)):
                if unknown := [source for source in sources if source not in self.sources]:
                    raise ValueError(f"{where}.{key}: unknown source {unknown[0]!r}; known: {', '.join(self.sources)}")
        if self.policies and self.pack.policy not in self.policies:
            raise ValueError(f"pack.policy: {self.pack.policy!r} is none of {', '.join(self.policies)}")
        return self


def template_fields(template: str) -> list[str]:
    """Return the names in braces of a custom template, in order. Raises ValueError for unbalanced braces."""
    return [field for _, field, _, _ in Formatter().parse(template) if field is not None]
