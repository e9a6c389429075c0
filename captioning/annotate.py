"""Run every tagger and scorer over the kept images, one read and one decode per image for all of them.

For every part of workspace.kept the part of the same name in annotations/<model>/, in the same order of keys. Raw
numbers only; words are made by `compose`. Batches are filled in the order of the part and the last one is filled up,
so killing a run and starting it again gives the same bytes. At most one part is done twice.
"""

import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from captioning.config import CaptioningConfig
from captioning.decode import UNREADABLE, Decoders, ImageTask, PreparedImage, default_workers
from captioning.plugin import OK, Identity, ImageModel, Pixels, RecordModel, Row
from captioning.registry import PLUGINS, ModelConfig
from captioning.scorers.base import NOT_FINITE
from captioning.scorers.date import NO_DATE
from captioning.taggers.base import LABELS_FILE
from sharding.config import ConfigError
from sharding.files import digest_of
from sharding.runlog import EventLog, Progress
from sharding.schema import Workspace
from sharding.tables import (
    DamagedPartError,
    is_current,
    list_parts,
    owned_parts,
    part_metadata,
    read_part,
    write_part,
)

logger = logging.getLogger(__name__)

_RECORD_COLUMNS = ("key", "source", "path", "num_bytes")


class BrokenFractionError(ValueError):
    """More images are broken than `max_broken_fraction` allows. What could be annotated is written."""


@dataclass(frozen=True)
class AnnotateReport:
    """What one call of `annotate` did, or with `is_dry_run` would do."""

    num_parts: int
    num_parts_current: int
    num_parts_written: int
    """Kept parts for which at least one model's part was written."""
    num_decodes: int
    num_images: int
    """Images that had to be looked at; not counted are those whose rows were current or reused."""
    num_rows: Mapping[str, int]
    """New rows by model."""
    num_rows_reused: Mapping[str, int]
    without_result: Mapping[str, int]
    """New rows without a result by reason; one for an image that no model could see."""
    is_dry_run: bool
    seconds: float
    waiting_seconds: float
    """Time in which models waited for decoding."""

    def summary(self) -> str:
        """Return a few lines for people."""
        verb = "to do" if self.is_dry_run else "done"
        rate = f", {self.num_images / self.seconds:.1f}/s" if self.seconds and not self.is_dry_run else ""
        lines = [
            f"annotate: {self.num_parts} parts, {self.num_parts_current} already current, {self.num_parts_written} "
            f"{verb}; {self.num_images:,} images, {self.num_decodes:,} decodes in {self.seconds:.1f} s{rate}"
        ]
        for model, number in self.num_rows.items():
            reused = self.num_rows_reused.get(model, 0)
            lines.append(f"  {model}: {number:,} rows" + (f", {reused:,} more kept" if reused else ""))
        lines += [f"  no result, {reason}: {number:,}" for reason, number in sorted(self.without_result.items())]
        return "\n".join(lines)


@dataclass
class _ModelWork:
    """What one model still has to do in one part."""

    identity: Identity
    target: Path
    made_from: str
    rows: list[Row | None]
    """In the order of the part; None where the model has not answered yet."""
    needed: list[int]
    """Places of the rows that were None at first."""


@dataclass
class _PartWork:
    """What is to be done in one kept part."""

    part: Path
    num_images: int
    models: dict[str, _ModelWork]
    """Only those without a current part."""
    num_broken: int
    """Images without a result that current parts already know of."""
    records: pa.Table | None
    """None when everything is current."""


Answer: TypeAlias = tuple[tuple[_PartWork, int | None], PreparedImage | None]
"""A part, the place of an image in it, and that image; at the end of the part neither place nor image."""


class _Batcher:
    """Collects the pixels of one model for one part and asks it a full batch at a time."""

    def __init__(self, model: ImageModel, rows: list[Row | None], *, batch_size: int) -> None:
        self._model = model
        self._rows = rows
        self._batch_size = model.batch_size or batch_size
        self._places: list[int] = []
        self._pixels: list[Pixels] = []

    def add(self, place: int, pixels: Pixels) -> None:
        self._places.append(place)
        self._pixels.append(pixels)
        if len(self._places) == self._batch_size:
            self.flush()

    def flush(self) -> None:
        """Ask the model; a short batch is filled up with its last image, so that every call has the same shape."""
        if not self._places:
            return
        filling = [self._pixels[-1]] * (self._batch_size - len(self._pixels))
        answers = self._model.predict(np.stack(self._pixels + filling))
        for place, row in zip(self._places, answers, strict=False):
            self._rows[place] = row
        self._places, self._pixels = [], []


def annotate(
    config: CaptioningConfig,
    workspace: Workspace,
    *,
    models: Sequence[str] | None = None,
    workers: int | None = None,
    part_index: int = 0,
    num_parts: int = 1,
    dry_run: bool = False,
) -> AnnotateReport:
    """Write, for each owned part, the rows of each model that are not there yet.

    models: names in config.annotate.models, default all. workers: decode processes, 0 for a thread of this one.
    Raises ConfigError, ModelError (MissingExtraError), FileNotFoundError without kept parts, BrokenFractionError after
    the part that goes over the limit is written, WorkerDiedError.
    """
    chosen = _chosen_models(config, models)
    kept = list_parts(workspace.kept)
    if not kept:
        raise FileNotFoundError(f"{workspace.kept}: no parts; run `python -m sharding dedupe` first")
    owned = owned_parts(kept, part_index, num_parts)
    run = _Run(config, workspace, chosen=chosen, num_workers=_num_workers(config, workers))
    return run.dry(owned) if dry_run else run.all_parts(owned)


class _Run:
    """One call of `annotate`: its models, and what it has counted so far."""

    def __init__(
        self, config: CaptioningConfig, workspace: Workspace, *, chosen: Sequence[str], num_workers: int
    ) -> None:
        self.config = config
        self.workspace = workspace
        self.num_workers = num_workers
        self.settings = {name: config.annotate.models[name] for name in chosen}
        self.identities = {name: _identify(it, config.annotate.min_side) for name, it in self.settings.items()}
        self.events = EventLog(workspace.events, stage="annotate")
        self.loaded: dict[str, ImageModel | RecordModel] = {}
        self.started = time.monotonic()
        self.waiting_seconds = 0.0
        self.num_parts = self.num_current = self.num_written = self.num_images = self.num_decodes = 0
        self.num_seen = self.num_broken = 0
        self.num_rows = Counter(dict.fromkeys(chosen, 0))
        self.num_reused: Counter[str] = Counter()
        self.without_result: Counter[str] = Counter()

    def dry(self, parts: Sequence[Path]) -> AnnotateReport:
        """Count what is to do."""
        for part in parts:
            self._count(self._plan(part))
        self.num_decodes = self.num_images
        return self._report(is_dry_run=True)

    def all_parts(self, parts: Sequence[Path]) -> AnnotateReport:
        """Do what is to do, part by part, while workers decode ahead, into the next part if need be."""
        self._write_labels()
        total = sum(pq.read_metadata(part).num_rows for part in parts)
        batch_size = self.config.annotate.batch_size
        batchers: dict[str, _Batcher] = {}
        with (
            Progress(total, unit="images", title="annotate") as progress,
            Decoders(self.num_workers, batch_size=batch_size) as decoders,
        ):
            stream = decoders.in_order(self._tasks(parts))
            while (item := self._wait_for(stream)) is not None:
                (work, place), prepared = item
                if prepared is not None and place is not None:
                    if not batchers:
                        batchers = {
                            name: _Batcher(self._image_model(name), work.models[name].rows, batch_size=batch_size)
                            for name in self._looking(work)
                        }
                    self._take(work, place, prepared, batchers)
                    progress.note(waiting=f"{self.waiting_seconds / (time.monotonic() - self.started):.0%}")
                    progress.advance()
                    continue
                for batcher in batchers.values():
                    batcher.flush()
                batchers = {}
                self._finish(work)
                progress.advance(work.num_images - len(self._image_places(work)))
        return self._report(is_dry_run=False)

    # --- one part ---

    def _plan(self, part: Path) -> _PartWork:
        records = read_part(part, list(dict.fromkeys([*_RECORD_COLUMNS, *self._extra_columns()])))
        keys = records.column("key").to_pylist()
        work = _PartWork(part, len(keys), {}, 0, None)
        for name, identity in self.identities.items():
            target = self.workspace.annotations(name) / part.name
            values = [[str(value) for value in records.column(it).to_pylist()] for it in identity.record_columns]
            made_from = digest_of([identity.digest, keys, values])
            facts = _facts(target)
            if facts.get("made_from") == made_from and facts.get("num_unreadable") == "0":
                work.num_broken = max(work.num_broken, int(facts["num_broken"]))
                continue
            rows: list[Row | None] = [None] * len(keys)
            if identity.needs_image and facts.get("model_digest") == identity.digest:
                known = {row.pop("key"): row for row in read_part(target).to_pylist()}
                rows = [row if row and row["status"] not in UNREADABLE else None for row in map(known.get, keys)]
            work.models[name] = _ModelWork(identity, target, made_from, rows, _needed(rows))
        if work.models:
            work.records = records
        return work

    def _tasks(self, parts: Sequence[Path]) -> Iterator[tuple[tuple[_PartWork, int | None], ImageTask | None]]:
        """Yield the images of each part that some model needs, and after them the part without an image."""
        for part in parts:
            work = self._plan(part)
            self._count(work)
            if work.records is not None:
                preparers = {name: self._image_model(name).preparer for name in self._looking(work)}
                needed = {name: set(work.models[name].needed) for name in preparers}
                for place in self._image_places(work):
                    record = work.records.slice(place, 1).to_pylist()[0]
                    wanted = {name: it for name, it in preparers.items() if place in needed[name]}
                    path = self._root(record["source"], part) / record["path"]
                    min_side = self.config.annotate.min_side
                    yield (work, place), ImageTask(record["key"], path, record["num_bytes"], wanted, min_side)
            yield (work, None), None

    def _take(self, work: _PartWork, place: int, prepared: PreparedImage, batchers: Mapping[str, _Batcher]) -> None:
        self.num_decodes += prepared.num_decodes
        if prepared.status == OK:
            for name, pixels in prepared.pixels.items():
                batchers[name].add(place, pixels)
            return
        assert work.records is not None
        key, path = work.records.column("key")[place].as_py(), work.records.column("path")[place].as_py()
        self.without_result[prepared.status] += 1
        logger.warning("%s  %s: %s: %s", key, path, prepared.status, prepared.detail)
        self.events.write("no_result", key=key, path=path, reason=prepared.status, detail=prepared.detail)
        for name in self._looking(work):
            rows = work.models[name].rows
            if rows[place] is None:
                rows[place] = _empty_row(work.models[name].identity.schema, prepared.status)

    def _finish(self, work: _PartWork) -> None:
        """Write the part of every model that lacked it, then see whether too many images are broken."""
        num_broken = work.num_broken
        for name, it in work.models.items():
            assert work.records is not None
            if not it.identity.needs_image:
                model = self._load(name)
                assert isinstance(model, RecordModel)
                it.rows[:] = model.annotate_records(work.records.select(list(it.identity.record_columns)))
            statuses = Counter(row["status"] for row in it.rows if row is not None)
            num_broken = max(num_broken, sum(n for status, n in statuses.items() if status not in (OK, NO_DATE)))
            for place in it.needed:
                row = it.rows[place]
                if row is not None and row["status"] in (NO_DATE, NOT_FINITE):
                    self.without_result[row["status"]] += 1
            _write(it, work.records.column("key"))
        self.num_written += bool(work.models)
        if work.models:
            self.events.write("part_written", part=work.part.name, models=list(work.models), images=work.num_images)
        self.num_seen += work.num_images
        self.num_broken += num_broken
        limit = self.config.max_broken_fraction
        if work.models and self.num_broken > limit * self.num_seen:
            raise BrokenFractionError(
                f"{self.num_broken:,} of {self.num_seen:,} images have no result, more than max_broken_fraction = "
                f"{limit}; the last part written is {work.part.name}, reasons are in {self.workspace.events}: repair "
                "the files or raise the limit, then run the same command again"
            )

    # --- models ---

    def _looking(self, work: _PartWork) -> list[str]:
        return [name for name, it in work.models.items() if it.identity.needs_image and it.needed]

    def _image_places(self, work: _PartWork) -> list[int]:
        return sorted({place for name in self._looking(work) for place in work.models[name].needed})

    def _load(self, name: str) -> ImageModel | RecordModel:
        if name not in self.loaded:
            settings = self.settings[name]
            logger.info("loading %s: %s", name, self.identities[name].model)
            self.loaded[name] = PLUGINS[settings.kind].load(settings, device=self.config.annotate.device)
        return self.loaded[name]

    def _image_model(self, name: str) -> ImageModel:
        model = self._load(name)
        assert isinstance(model, ImageModel), name
        min_side, needed = self.config.annotate.min_side, model.preparer.min_side
        if min_side is not None and min_side < needed:
            raise ConfigError(f"annotate.min_side: {min_side} is below the {needed} pixels that {name!r} looks at")
        return model

    def _write_labels(self) -> None:
        for name, identity in self.identities.items():
            if identity.labels is not None:
                path = self.workspace.annotations(name) / LABELS_FILE
                if not is_current(path, identity.digest):
                    write_part(path, identity.labels, made_from=identity.digest, metadata=identity.metadata)

    # --- the rest ---

    def _extra_columns(self) -> list[str]:
        return [column for identity in self.identities.values() for column in identity.record_columns]

    def _root(self, source: str, part: Path) -> Path:
        if source not in self.config.sources:
            raise ConfigError(
                f"{part}: has images of source {source!r}, which the config does not name; known: "
                f"{', '.join(self.config.sources)}"
            )
        return self.config.sources[source].root

    def _wait_for(self, stream: Iterator[Answer]) -> Answer | None:
        started = time.monotonic()
        try:
            return next(stream, None)
        finally:
            self.waiting_seconds += time.monotonic() - started

    def _count(self, work: _PartWork) -> None:
        self.num_parts += 1
        self.num_images += len(self._image_places(work))
        for name, it in work.models.items():
            self.num_rows[name] += len(it.needed)
            self.num_reused[name] += work.num_images - len(it.needed)
        self.num_current += not work.models

    def _report(self, *, is_dry_run: bool) -> AnnotateReport:
        return AnnotateReport(
            num_parts=self.num_parts,
            num_parts_current=self.num_current,
            num_parts_written=self.num_parts - self.num_current if is_dry_run else self.num_written,
            num_decodes=self.num_decodes,
            num_images=self.num_images,
            num_rows=dict(self.num_rows),
            num_rows_reused={name: number for name, number in self.num_reused.items() if number},
            without_result=dict(self.without_result),
            is_dry_run=is_dry_run,
            seconds=time.monotonic() - self.started,
            waiting_seconds=self.waiting_seconds,
        )


# --- helpers ---


def _chosen_models(config: CaptioningConfig, models: Sequence[str] | None) -> list[str]:
    known = config.annotate.models
    if not known:
        raise ConfigError("annotate.models: the dataset names no model; add a table [annotate.models.NAME]")
    for name in models or ():
        if name not in known:
            raise ConfigError(f"model {name!r}: unknown; annotate.models has {', '.join(known)}")
    return list(known if models is None else dict.fromkeys(models))


def _identify(settings: ModelConfig, min_side: int | None) -> Identity:
    identity = PLUGINS[settings.kind].identify(settings)
    if min_side is None or not identity.needs_image:
        return identity
    return replace(identity, preprocessing=f"{identity.preprocessing} min_side {min_side}")


def _num_workers(config: CaptioningConfig, workers: int | None) -> int:
    if workers is not None and workers < 0:
        raise ConfigError(f"workers must be 0 or more, got {workers}")
    number = workers if workers is not None else config.annotate.workers
    return default_workers() if number is None else number


def _needed(rows: Sequence[Row | None]) -> list[int]:
    return [place for place, row in enumerate(rows) if row is None]


def _facts(path: Path) -> dict[str, str]:
    """Return what is stored with a part; a part that is absent or damaged has nothing to say and is made again."""
    try:
        return part_metadata(path)
    except FileNotFoundError:
        return {}
    except DamagedPartError as error:
        logger.warning("%s", error)
        return {}


def _empty_row(schema: pa.Schema, status: str) -> Row:
    empty: Row = {column.name: [] if pa.types.is_list(column.type) else None for column in schema}
    del empty["key"]
    return empty | {"status": status}


def _write(work: _ModelWork, keys: pa.ChunkedArray) -> None:
    rows = [{"key": key, **(row or {})} for key, row in zip(keys.to_pylist(), work.rows, strict=True)]
    assert all("status" in row for row in rows), work.target
    table = pa.Table.from_pylist(rows, schema=work.identity.schema)
    statuses = Counter(table.column("status").to_pylist())
    facts = {
        "num_unreadable": str(sum(statuses[status] for status in UNREADABLE)),
        "num_broken": str(sum(number for status, number in statuses.items() if status not in (OK, NO_DATE))),
    }
    write_part(work.target, table, made_from=work.made_from, metadata=work.identity.metadata | facts)
