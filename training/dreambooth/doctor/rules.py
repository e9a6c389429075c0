"""The doctor's limits, from TOML: what counts as a fault, how bad it is, and the rule of the wiki behind it."""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from sharding.config import Config, ConfigError, parse_config, read_toml
from training.bucket_list import BucketSettings

BUILTIN = Path(__file__).with_name("rules.toml")
Severity = Literal["fail", "warn", "note"]
SEVERITIES: tuple[Severity, ...] = ("fail", "warn", "note")


class Rule(Config):
    """One rule: a number is a fault above (or below) a limit."""

    wiki: str
    """What the wiki says."""
    below: bool = False
    """Whether numbers below the limits are the faults."""
    note: float | None = None
    """Limit behind which it is mentioned."""
    warn: float | None = None
    """Limit behind which it should be looked at."""
    fail: float | None = None
    """Limit behind which the data are held to be bad: the exit code is 3."""
    advice: str = ""
    """What to do."""
    off: bool = False
    """Whether it is left out."""

    def judge(self, number: float) -> tuple[Severity, float] | None:
        """Return the worst severity whose limit the number breaks, with that limit; None for a good number."""
        for severity in SEVERITIES:
            limit: float | None = getattr(self, severity)
            if limit is not None and not self.off and (number < limit if self.below else number > limit):
                return severity, limit
        return None


class TrainingRules(Config):
    """What the run will do with the data."""

    resolution: int = Field(512, ge=64)
    """Side of a square bucket in pixels."""
    step: int = Field(64, ge=1)
    """Sides of buckets are multiples of this."""
    flip: bool = False
    """Whether pictures are mirrored at random."""
    epochs: int = Field(0, ge=0)
    """For how long; 0: not said, and not judged."""
    styles: tuple[str, ...] = ()
    """Concepts that teach an artist's style; those in a folder "Artwork" or "Style" are taken for some without this."""

    @property
    def buckets(self) -> BucketSettings:
        """The wiki's ratio table: the long side with every shorter one down to half of it."""
        return BucketSettings("long_side", self.resolution**2, step=self.step)


class FixRules(Config):
    """What `--fix` does to its copies, besides what loses nothing: upright, alpha laid on white, bars cut off."""

    levels: Literal["no", "beside", "replace"] = "no"
    """Auto level and auto contrast: not at all, as further copies beside the raw one (the wiki mixes them), or auto
    level in its place."""
    levels_change: float = Field(0.03, ge=0)
    """Mean difference, of 1, that levels must make; less is left as it is."""
    stitch: bool = False
    """Whether frames of one pan become one picture, which takes their place."""
    upscale: float = Field(1.0, ge=1, le=2)
    """Times a picture is enlarged by the upscaler, if one is given; 1 only cleans it."""
    max_crop: float = Field(0.2, ge=0, lt=1)
    """Share of a picture that the crop to the wiki's ratios may cut off; one that would lose more keeps its shape."""
    long_side: int = Field(1080, ge=0)
    """Pixels of the longer side that larger copies are brought down to; 0 leaves them large."""


class DetectorRules(Config):
    """How the answers of an ONNX detector are read (`--detector`); a Python plug-in answers in these labels itself."""

    labels: tuple[str, ...] = ("person",)
    """Of its classes, in order, when the file itself does not name them; "person" and "face" are asked for."""
    renamed: dict[str, str] = Field(default_factory=dict)
    """The file's own names → "person" or "face"."""
    score: float = Field(0.35, ge=0, le=1)
    """Boxes of which it is less sure are left out."""
    overlap: float = Field(0.5, gt=0, le=1)
    """Of two boxes of one label that share more than this of both together, the less sure one is left out."""


class Words(Config):
    """Tags by what they tell, in Danbooru's words."""

    generic: tuple[str, ...]
    """Say nothing of this concept."""
    close_up: tuple[str, ...]
    """Only a part of the figure is seen."""
    full_body: tuple[str, ...]
    """Most of the figure is seen."""
    camera: tuple[str, ...]
    """Where it is seen from."""
    direction: tuple[str, ...]
    """Where the body turns to."""
    face: tuple[str, ...]
    """Expressions."""
    action: tuple[str, ...]
    """What is done."""
    clothing: tuple[str, ...]
    """Last words of clothes: "black shirt" is a shirt."""
    defaults: tuple[str, ...]
    """Last words of what belongs to a character always."""
    text: tuple[str, ...]
    """There is writing in the picture."""
    covered: tuple[str, ...]
    """The face cannot be seen."""
    away: tuple[str, ...]
    """The face looks away, so that none is missed."""
    bad: tuple[str, ...]
    """The drawing or the file is bad."""
    artists: tuple[str, ...] = ()
    """Artists' names, when a style set has more than one."""


class Rules(Config):
    """All of them, with their words."""

    training: TrainingRules
    fix: FixRules
    detector: DetectorRules
    words: Words
    rules: dict[str, Rule]

    @model_validator(mode="after")
    def _all_have_a_limit(self) -> "Rules":
        for name, rule in self.rules.items():
            if rule.note is None and rule.warn is None and rule.fail is None:
                raise ValueError(f"rules.{name}: give one of note, warn and fail")
        return self


@dataclass(frozen=True)
class Finding:
    """A number behind its limit. file: None for a concept as a whole."""

    severity: Severity
    rule: str
    concept: str
    file: Path | None
    number: float
    limit: float
    text: str
    """What was seen."""


def load_rules(path: Path | None = None, overrides: Sequence[str] = ()) -> Rules:
    """Read the rules: the builtin ones with what a file, and `key.path=value` overrides, change of them.

    Raises ConfigError (also for a rule that there is not), FileNotFoundError.
    """
    values: dict[str, Any] = tomllib.loads(BUILTIN.read_text(encoding="utf-8"))
    known = set(values["rules"])
    if path is not None:
        values = _merged(values, read_toml(path))
    rules = parse_config(values, Rules, name=str(path or "rules"), overrides=overrides)
    if unknown := sorted(set(rules.rules) - known):
        raise ConfigError(f"{path or 'rules'}: no rule {unknown[0]!r}; there are {', '.join(sorted(known))}")
    return rules


def _merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(values)
    for key, value in changes.items():
        inner = result.get(key)
        both = isinstance(inner, Mapping) and isinstance(value, Mapping)
        result[key] = _merged(inner, value) if both and isinstance(inner, Mapping) else value
    return result
