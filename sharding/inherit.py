"""What a keeper inherits from the files dropped for it: their tags, and a date and a rating if it has none.

Pure but for reading parts of the manifest. Only the rows of dropped files and their keepers are read.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sharding.schema import MANIFEST, TAG_CATEGORIES
from sharding.tables import iterate_rows, read_part

_TAG_COLUMNS = tuple(f"tags_{category}" for category in TAG_CATEGORIES)
_COLUMNS = (*_TAG_COLUMNS, "created_at", "date_source", "rating")


@dataclass
class Inheritance:
    """What the files dropped for one keeper have. Grows while parts are read, in manifest order."""

    tags: dict[str, set[str]] = field(default_factory=dict)
    created_at: datetime | None = None
    date_source: str = ""
    rating: str = ""

    def add(self, row: Mapping[str, Any]) -> None:
        for column in _TAG_COLUMNS:
            if row[column]:
                self.tags.setdefault(column, set()).update(row[column])
        if row["created_at"] is not None and (self.created_at is None or row["created_at"] < self.created_at):
            self.created_at, self.date_source = row["created_at"], row["date_source"]
        self.rating = self.rating or row["rating"]

    def digestible(self) -> list[Any]:
        """Return the same as plain values, sorted."""
        tags = sorted((column, sorted(tags)) for column, tags in self.tags.items())
        return [tags, str(self.created_at), self.date_source, self.rating]


def collect_inheritances(
    parts: list[Path],
    part_of_row: npt.NDArray[np.int32],
    row_in_part: npt.NDArray[np.int32],
    keeper: npt.NDArray[np.int64],
) -> dict[int, Inheritance]:
    """Return, by row of the keeper, what those dropped for it have. Rows with nothing to give make no entry."""
    inheritances: dict[int, Inheritance] = {}
    dropped = np.nonzero(keeper != np.arange(len(keeper)))[0]
    starts = np.searchsorted(part_of_row[dropped], np.arange(len(parts) + 1))
    for number, part in enumerate(parts):
        rows = dropped[starts[number] : starts[number + 1]]
        if not len(rows):
            continue
        table = read_part(part, _COLUMNS).take(row_in_part[rows])
        for row, values in zip(rows.tolist(), iterate_rows(table), strict=True):
            if any(values[column] for column in _COLUMNS):
                inheritances.setdefault(int(keeper[row]), Inheritance()).add(values)
    return inheritances


def with_inheritances(table: pa.Table, inheritances: Mapping[int, Inheritance]) -> pa.Table:
    """Return manifest rows with what they inherit, by position in the table.

    Tags: the row's own in their order, then the others sorted. A date or rating only where the row has none.
    """
    if not inheritances:
        return table
    columns = {name: table.column(name).to_pylist() for name in _COLUMNS}
    for place, inheritance in inheritances.items():
        for column, tags in inheritance.tags.items():
            own = columns[column][place] or []
            columns[column][place] = [*own, *sorted(tags.difference(own))]
        if columns["created_at"][place] is None and inheritance.created_at is not None:
            columns["created_at"][place] = inheritance.created_at
            columns["date_source"][place] = inheritance.date_source
        columns["rating"][place] = columns["rating"][place] or inheritance.rating
    for name, values in columns.items():
        table = table.set_column(MANIFEST.names.index(name), name, pa.array(values, MANIFEST.field(name).type))
    return table
