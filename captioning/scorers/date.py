"""The year a picture was posted or made, as a score. Needs no pixels.

`created_at` comes from the scan (post, EXIF or path); without one the status is `no_date` and there is no score.
"""

from typing import Literal

import pyarrow as pa

from captioning.plugin import Device, Identity, Row
from captioning.scorers.base import empty_score_row, score_rows
from sharding.config import Config
from sharding.schema import SCORES

NO_DATE = "no_date"


class DateConfig(Config):
    """The year of the record's date."""

    kind: Literal["date"]
    """Selects this plug-in."""


class DateScorer:
    """Reads the year; there is nothing to load."""

    def annotate_records(self, records: pa.Table) -> list[Row]:
        """Return schema.SCORES rows; records: the column `created_at`."""
        dates = records.column("created_at").to_pylist()
        return [empty_score_row(NO_DATE) if date is None else score_rows([date.year])[0] for date in dates]


def identify(settings: DateConfig) -> Identity:
    """Say that rows are made of `created_at`."""
    return Identity(
        model=settings.kind,
        revision="1",
        preprocessing="year/1",
        schema=SCORES,
        record_columns=("created_at",),
    )


def load(settings: DateConfig, *, device: Device) -> DateScorer:
    """Return the scorer; runs on any device."""
    return DateScorer()
