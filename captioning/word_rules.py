"""Settings of words that a picture has one of: tiers by scores or votes, date, style, rating.

Only settings; `record_words` applies them.
"""

from itertools import pairwise
from typing import Literal

from pydantic import Field, model_validator

from captioning.spelling import clean_word
from sharding.config import Config, Name
from sharding.schema import RATINGS

Comparison = Literal[">", ">="]


def check_word(word: str) -> None:
    """Raise ValueError for a text that would not stay one word of a caption."""
    if word != clean_word(word):
        raise ValueError(f"{word!r} is not one word of a caption: it has a comma, or spaces at an end or in a row")


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
        for word in (*(word for _, word in self.steps), self.rest):
            check_word(word)
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

    @model_validator(mode="after")
    def _words_are_single(self) -> "RatingWordsConfig":
        for word in self.words:
            check_word(word)
        return self

    @property
    def words(self) -> tuple[str, ...]:
        """The words in the order of schema.RATINGS."""
        return tuple(getattr(self, rating) for rating in RATINGS)
