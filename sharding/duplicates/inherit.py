"""What a keeper inherits from the files dropped for it: their tags, and a date and a rating if it has none.

Pure but for reading parts of the manifest. Only the rows of dropped files and their keepers are read, and only those
of some hundred thousand of them are held at a time.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sharding.duplicates.candidates import Places
from sharding.schema import MANIFEST, TAG_CATEGORIES
from sharding.tables import iterate_rows

_TAG_COLUMNS = tuple(f"tags_{category}" for category in TAG_CATEGORIES)
_COLUMNS = (*_TAG_COLUMNS, "created_at", "date_source", "rating")
_ROWS_HELD = 300_000

Rows = npt.NDArray[np.int64]


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


class Inheritances:
    """What the keepers of one part after the other inherit. Ask for the parts in ascending order."""

    def __init__(self, places: Places, heir: Rows, dropped: Rows) -> None:
        """dropped: rows of the candidates that are dropped; heir: for each its keeper's row."""
        order = np.lexsort((dropped, heir))
        self.places = places
        self.heir, self.dropped = heir[order], dropped[order]
        self._first = self._last = 0
        self._table: pa.Table | None = None

    def of_part(self, number: int) -> dict[int, Inheritance]:
        """Return what there is for the keepers of a part, by the keeper's row. Who gets nothing makes no entry."""
        rows = self.places.of_part(number)
        first, last = (int(place) for place in np.searchsorted(self.heir, [rows.start, rows.stop]))
        if first == last:
            return {}
        if self._table is None or last > self._last:
            self._first, self._last = first, max(last, first + _ROWS_HELD)
            self._table = self.places.read(self.dropped[first : self._last], _COLUMNS)
        found: dict[int, Inheritance] = {}
        table = self._table.slice(first - self._first, last - first)
        for row, values in zip(self.heir[first:last].tolist(), iterate_rows(table), strict=True):
            if any(values[column] for column in _COLUMNS):
                found.setdefault(row, Inheritance()).add(values)
        return found


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
