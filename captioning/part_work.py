"""What is still to be done in one part, and the parts of annotations that come out of it.

A row is made once: rows of the same key by the same model are taken over, a recorded failure included. Only a file
that could not be read, or was not the one that was scanned, is looked at again, and only when the part's records have
changed or a retry is asked for. No model is run here.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from captioning.decode import UNREADABLE
from captioning.plugin import NOT_APPLICABLE, OK, Identity, Row
from captioning.prompts import Prompt
from sharding.config import ConfigError
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
    needed: list[int] = field(default_factory=list)
    """Places of the rows that were None at first."""
    prompts: "Prompts | None" = None
    """For captioners."""

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
    def keys(self) -> list[str]:
        keys: list[str] = self.records.column("key").to_pylist()
        return keys

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


class Prompts:
    """What one captioner is asked about the images of one part."""

    def __init__(self, prompt: Prompt, work: "PartWork", tagger: Identity | None, workspace: Workspace) -> None:
        self._prompt = prompt
        self._records = work.records.select(list(prompt.record_columns)).to_pylist()
        self._labels = tagger.labels if tagger else None
        self._tagger_rows: list[Row | None] = [None] * work.num_images
        if tagger is None:
            return
        if prompt.tagger in work.models:
            self._tagger_rows = work.models[prompt.tagger].rows  # filled in as the tagger looks at the part
        elif (known := _known_rows(workspace.annotations(prompt.tagger) / work.part.name, tagger)) is not None:
            self._tagger_rows = [known.get(key) for key in work.keys]
        if prompt.tagger not in work.models and None in self._tagger_rows:
            raise ConfigError(
                f"{work.part}: not every image has a row of {prompt.tagger!r}, whose tags a captioner is given as "
                f"hints; add {prompt.tagger} to --models"
            )

    def text(self, place: int) -> str | None:
        """Return what is asked; None while the tagger has not answered yet."""
        if self._labels is None:
            return self._prompt.of_record(self._records[place])
        row = self._tagger_rows[place]
        return None if row is None else self._prompt.of_tagger(row, self._labels)


def plan_part(
    part: Path,
    identities: Mapping[str, Identity],
    workspace: Workspace,
    *,
    retry: bool,
    taggers: Mapping[str, Identity] | None = None,
) -> PartWork:
    """Compare a kept part with the annotations that are there.

    retry: look again at files that could not be read or had changed. taggers: by name, those that captioners take
    hints from. Raises DamagedPartError, ConfigError where such a tagger has not answered and is not to be run.
    """
    columns = [*_RECORD_COLUMNS, *(column for it in identities.values() for column in _columns(it))]
    records = read_part(part, list(dict.fromkeys(columns)))
    keys = records.column("key").to_pylist()
    taggers = taggers or {}
    models: dict[str, ModelWork] = {}
    num_broken = 0
    for name, identity in identities.items():
        target = workspace.annotations(name) / part.name
        looked_at = identity.record_columns or ("source", "path", *_columns(identity))
        values = [[str(value) for value in records.column(column).to_pylist()] for column in looked_at]
        made_from = digest_of([identity.digest, keys, values])
        facts = _facts(target)
        if facts.get("made_from") == made_from and not (retry and facts["num_unreadable"] != "0"):
            num_broken = max(num_broken, int(facts["num_broken"]))
            continue
        rows: Sequence[Row | None] = [None] * len(keys)
        if identity.needs_image and (known := _known_rows(target, identity)) is not None:
            rows = [row if row and row["status"] not in UNREADABLE else None for row in map(known.get, keys)]
        models[name] = ModelWork(identity, target, made_from, list(rows))
    work = PartWork(part, records, models, num_broken)
    for it in models.values():
        if it.identity.prompt is not None:
            prompts = Prompts(it.identity.prompt, work, taggers.get(it.identity.prompt.tagger), workspace)
            it.prompts = prompts
            # Asked otherwise, as when a record's tags have changed, a captioner may say something else.
            it.rows[:] = [row if row and _is_of(row, prompts.text(n)) else None for n, row in enumerate(it.rows)]
        it.needed = [place for place, row in enumerate(it.rows) if row is None]
    return work


def _columns(identity: Identity) -> tuple[str, ...]:
    return identity.record_columns or (identity.prompt.record_columns if identity.prompt else ())


def _is_of(row: Row, prompt: str | None) -> bool:
    return bool(row["status"] != OK or row["prompt"] == prompt)


def _known_rows(path: Path, identity: Identity) -> dict[str, Row] | None:
    """Return the rows by key of a part that the same model made with the same settings; None without one."""
    if _facts(path).get("model_digest") != identity.digest:
        return None
    return {row.pop("key"): row for row in read_part(path).to_pylist()}


def _facts(path: Path) -> dict[str, str]:
    """Return what is stored with a part; a part that is absent or damaged has nothing to say and is made again."""
    try:
        return part_metadata(path)
    except FileNotFoundError:
        return {}
    except DamagedPartError as error:
        logger.warning("%s", error)
        return {}
