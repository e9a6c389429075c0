"""What is still to be done in one part, and the parts of annotations that come out of it.

A row is made once: rows of the same key by the same model are taken over, a recorded failure included. Only a file
that could not be read, or was not the one that was scanned, is looked at again, and only when the part's records have
changed or a retry is asked for. No model is run here.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from captioning.decode import UNREADABLE
from captioning.plugin import NOT_APPLICABLE, OK, Identity, Row
from sharding.files import digest_of
from sharding.schema import Workspace
from sharding.tables import DamagedPartError, part_metadata, read_part, write_part

logger = logging.getLogger(__name__)

_RECORD_COLUMNS = ("key", "source", "path", "num_bytes")


@dataclass
class ModelWork:
    """What one model still has to do in one part."""

    identity: Identity
    target: Path
    made_from: str
    rows: list[Row | None]
    """In the order of the part; None where the model has not answered yet."""
    needed: list[int]
    """Places of the rows that were None at first."""

    def write(self, keys: pa.ChunkedArray) -> None:
        """Write the part; every row must be there."""
        rows = [{"key": key, **(row or {})} for key, row in zip(keys.to_pylist(), self.rows, strict=True)]
        assert all("status" in row for row in rows), self.target
        table = pa.Table.from_pylist(rows, schema=self.identity.schema)
        statuses = table.column("status").to_pylist()
        facts = {
            "num_broken": str(self.num_broken),
            "num_unreadable": str(sum(status in UNREADABLE for status in statuses)),
            # With made_from it says which rows these are: a retry may change them.
            "statuses": digest_of(statuses),
        }
        write_part(self.target, table, made_from=self.made_from, metadata=self.identity.metadata | facts)

    @property
    def num_broken(self) -> int:
        """Images without a result; not those without a value, such as a date or the JPEG quality of a PNG."""
        if not self.identity.needs_image:
            return 0
        return sum(row is not None and row["status"] not in (OK, NOT_APPLICABLE) for row in self.rows)


@dataclass
class PartWork:
    """What is to be done in one kept part."""

    part: Path
    records: pa.Table
    models: Mapping[str, ModelWork]
    """Those without a current part."""
    num_broken_before: int
    """Images without a result that current parts know of."""

    @property
    def num_images(self) -> int:
        return int(self.records.num_rows)

    @property
    def num_broken(self) -> int:
        """Images without a result, by the model that has most."""
        return max([self.num_broken_before, *(it.num_broken for it in self.models.values())])

    @property
    def looking(self) -> list[str]:
        """Models that have to see images of this part."""
        return [name for name, it in self.models.items() if it.identity.needs_image and it.needed]

    @property
    def places(self) -> list[int]:
        """Places of the images that some model has to see."""
        return sorted({place for name in self.looking for place in self.models[name].needed})


def plan_part(part: Path, identities: Mapping[str, Identity], workspace: Workspace, *, retry: bool) -> PartWork:
    """Compare a kept part with the annotations that are there.

    retry: look again at files that could not be read or had changed. Raises DamagedPartError.
    """
    columns = [*_RECORD_COLUMNS, *(column for identity in identities.values() for column in identity.record_columns)]
    records = read_part(part, list(dict.fromkeys(columns)))
    keys = records.column("key").to_pylist()
    models: dict[str, ModelWork] = {}
    num_broken = 0
    for name, identity in identities.items():
        target = workspace.annotations(name) / part.name
        looked_at = identity.record_columns or ("source", "path")
        values = [[str(value) for value in records.column(column).to_pylist()] for column in looked_at]
        made_from = digest_of([identity.digest, keys, values])
        facts = _facts(target)
        if facts.get("made_from") == made_from and not (retry and facts["num_unreadable"] != "0"):
            num_broken = max(num_broken, int(facts["num_broken"]))
            continue
        rows: Sequence[Row | None] = [None] * len(keys)
        if identity.needs_image and facts.get("model_digest") == identity.digest:
            known = {row.pop("key"): row for row in read_part(target).to_pylist()}
            rows = [row if row and row["status"] not in UNREADABLE else None for row in map(known.get, keys)]
        needed = [place for place, row in enumerate(rows) if row is None]
        models[name] = ModelWork(identity, target, made_from, list(rows), needed)
    return PartWork(part, records, models, num_broken)


def _facts(path: Path) -> dict[str, str]:
    """Return what is stored with a part; a part that is absent or damaged has nothing to say and is made again."""
    try:
        return part_metadata(path)
    except FileNotFoundError:
        return {}
    except DamagedPartError as error:
        logger.warning("%s", error)
        return {}
