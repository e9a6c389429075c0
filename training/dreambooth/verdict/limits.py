"""The verdict's numbers, from `verdict.toml`: what is measured, and from where on it is a sign."""

from functools import lru_cache
from pathlib import Path

from pydantic import Field

from sharding.config import Config, parse_config, read_toml

BUILTIN = Path(__file__).with_name("verdict.toml")


class Measure(Config):
    """What is measured."""

    pictures_per_concept: int = Field(ge=1)
    timesteps: tuple[float, ...] = Field(min_length=1)
    reference_pictures: int = Field(ge=1)


class Rule(Config):
    """Limits; their meaning stands beside them in the file."""

    min_points: int = Field(ge=2)
    recent: float = Field(gt=0, lt=1)
    min_learned: float = Field(ge=0)
    still_falling: float = Field(ge=0)
    held_out_rise: float = Field(ge=0)
    gap_growth: float = Field(ge=0)
    nearest: float = Field(gt=0, le=1)
    drift: float = Field(gt=0, le=1)


class Limits(Config):
    """The whole file."""

    measure: Measure
    rule: Rule


@lru_cache(maxsize=1)
def builtin_limits() -> Limits:
    """Return what `verdict.toml` says."""
    return parse_config(read_toml(BUILTIN), Limits, name=BUILTIN.name)
