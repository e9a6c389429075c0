"""What every tagger stores: probabilities of tags above a floor, and its list of labels.

Pure functions on arrays; no model.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field

from captioning.model_files import ModelFilesSettings
from captioning.plugin import NOT_FINITE, OK, ModelError, Row, empty_row
from sharding.schema import LABELS, RATINGS, TAGGER

LABELS_FILE = "labels.parquet"
"""Beside the parts of a tagger: what its tag ids mean."""


class TaggerSettings(ModelFilesSettings):
    """What every tagger has; a policy may name only such a model as its `tagger`."""

    floor: float = Field(0.05, ge=0, lt=1)
    """Probabilities below this are not stored; thresholds of a policy cannot go lower."""


@dataclass(frozen=True)
class Label:
    """One output of a tagger. name: underscore form; category: one of rating, general, character, copyright, …; both
    are empty for an output that its label file leaves out."""

    name: str
    category: str

    @property
    def is_tag(self) -> bool:
        """Neither a rating, which is stored apart, nor nothing."""
        return self.category not in ("rating", "")


def label_table(labels: Sequence[Label]) -> pa.Table:
    """Return schema.LABELS; tag_id is the position of the label, which is the position of the output."""
    return pa.Table.from_pydict(
        {
            "tag_id": list(range(len(labels))),
            "name": [label.name for label in labels],
            "category": [label.category for label in labels],
        },
        schema=LABELS,
    )


def rating_columns(labels: Sequence[Label]) -> list[int]:
    """Return the outputs that are the four ratings, in the order of RATINGS; empty when the model rates nothing.

    Raises ModelError when it has only some of them.
    """
    found = {label.name: number for number, label in enumerate(labels) if label.category == "rating"}
    if not found:
        return []
    if sorted(found) != sorted(RATINGS):
        raise ModelError(f"rating labels are {', '.join(sorted(found))}, expected {', '.join(RATINGS)}")
    return [found[name] for name in RATINGS]


def tagger_rows(
    probs: npt.NDArray[np.float32], *, rating_ids: Sequence[int | None], tag_ids: npt.NDArray[np.int32], floor: float
) -> list[Row]:
    """Return schema.TAGGER rows without keys.

    probs: (N, L) float32; tag_ids: the outputs that are tags, ascending; rating_ids: None for a rating that the model
    does not know, which gets probability 0. A row with a value that is not finite gets status `not_finite` and no tags.
    """
    rows: list[Row] = []
    limit = np.float32(floor)
    for row in probs:
        if not np.isfinite(row).all():
            rows.append(empty_row(TAGGER, NOT_FINITE))
            continue
        tags = row[tag_ids]
        chosen = tags >= limit
        rows.append(
            {
                "rating_probs": [0.0 if number is None else float(row[number]) for number in rating_ids],
                "tag_ids": tag_ids[chosen].tolist(),
                "tag_probs": tags[chosen].tolist(),
                "status": OK,
            }
        )
    return rows
