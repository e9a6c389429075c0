"""The year a picture was posted or made, as a score. Needs no pixels.

`created_at` comes from the scan (post, EXIF or path); without one the status is `no_date` and there is no score.
"""

import pyarrow as pa

from captioning.plugin import Device, Identity, ModelSettings, Row, empty_row
from captioning.scorers.base import score_rows
from sharding.schema import SCORES

NO_DATE = "no_date"


class Settings(ModelSettings):
    """The year of the record's date; there is nothing to set."""


class DateScorer:
    """Reads the year; there is nothing to load."""

    def annotate_records(self, records: pa.Table) -> list[Row]:
        """Return schema.SCORES rows; records: the column `created_at`."""
        dates = records.column("created_at").to_pylist()
        return [empty_row(SCORES, NO_DATE) if date is None else score_rows([date.year])[0] for date in dates]


def identify(settings: Settings) -> Identity:
    """Say that rows are made of `created_at`."""
    return Identity("date", revision="1", preprocessing="year/1", schema=SCORES, record_columns=("created_at",))


def load(settings: Settings, *, device: Device) -> DateScorer:
    """Return the scorer; runs on any device."""
    return DateScorer()
