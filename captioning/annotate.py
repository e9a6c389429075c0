"""Run every tagger and scorer over the kept images, one read and one decode per image for all of them.

Heads of one backbone share its features, too: a CLIP sees an image once, however many scorers stand on it.

For every part of workspace.kept the part of the same name in annotations/<model>/, in the same order of keys. Raw
numbers only; words are made by `compose`. Batches are filled in the order of the part and the last one is filled up,
so killing a run and starting it again gives the same bytes. At most one part is done twice.
"""

import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from captioning.config import CaptioningConfig
from captioning.decode import Decoders, ImageTask, PreparedImage, default_workers
from captioning.part_work import PartWork, plan_part
from captioning.plugin import (
    FULL_SIZE,
    OK,
    Backbone,
    BackboneSpec,
    HeadModel,
    Identity,
    ImageModel,
    ModelError,
    RecordModel,
    Row,
    empty_row,
)
from captioning.registry import PLUGINS
from captioning.taggers.base import LABELS_FILE
from sharding.config import ConfigError
from sharding.images import BrokenFractionError, is_too_broken
from sharding.runlog import EventLog, Progress
from sharding.schema import Workspace
from sharding.tables import is_current, list_parts, owned_parts, read_part, write_part

logger = logging.getLogger(__name__)


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
    loading_seconds: float
    """Time that loading the models took."""
    waiting_seconds: float
    """Time in which loaded models waited for decoding."""

    def summary(self) -> str:
        """Return a few lines for people."""
        if not self.num_rows:
            return "annotate: the dataset names no models, nothing to do"
        verb = "to do" if self.is_dry_run else "done"
        lines = [
            f"annotate: {self.num_parts} parts, {self.num_parts_current} already current, {self.num_parts_written} "
            f"{verb}; {self.num_images:,} images, {self.num_decodes:,} decodes in {self.seconds:.1f} s"
        ]
        if self.num_images and not self.is_dry_run:
            running_seconds = self.seconds - self.loading_seconds
            lines[0] += (
                f"; {self.loading_seconds:.1f} s to load models, then {self.num_images / running_seconds:.1f}/s, "
                f"{self.waiting_seconds / running_seconds:.0%} of it waiting for images"
            )
        for model, number in self.num_rows.items():
            reused = self.num_rows_reused.get(model, 0)
            lines.append(f"  {model}: {number:,} rows" + (f", {reused:,} more kept" if reused else ""))
        lines += [f"  no result, {reason}: {number:,}" for reason, number in sorted(self.without_result.items())]
        return "\n".join(lines)


Answer: TypeAlias = tuple[tuple[PartWork, int | None], PreparedImage | None]
"""A part, the place of an image in it, and that image; at the end of the part neither place nor image."""


@dataclass(frozen=True)
class _Viewer:
    """What sees images, and the models that speak of them: an image model for itself, or the heads of a backbone."""

    eye: ImageModel | Backbone
    heads: Mapping[str, HeadModel]
    """By model; empty for an image model."""
    models: tuple[str, ...]

    def look(self, batch: npt.NDArray[Any]) -> dict[str, list[Row]]:
        """Return the rows of each model."""
        if isinstance(self.eye, ImageModel):
            return {self.models[0]: self.eye.predict(batch)}
        features = self.eye.embed(batch)
        return {name: head.score(features) for name, head in self.heads.items()}


class _Batcher:
    """Collects what one viewer is to see of one part, and asks it a full batch at a time."""

    def __init__(self, viewer: _Viewer, rows: Mapping[str, list[Row | None]], *, batch_size: int) -> None:
        self._viewer = viewer
        self._rows = rows
        self._batch_size = viewer.eye.batch_size or batch_size
        self._places: list[int] = []
        self._pixels: list[npt.NDArray[Any]] = []
        self._answers: dict[str, list[Row]] = {name: [] for name in viewer.models}

    def add(self, place: int, pixels: npt.NDArray[Any]) -> None:
        self._places.append(place)
        self._pixels.append(pixels)
        if len(self._places) == self._batch_size:
            self._flush()

    def _flush(self) -> None:
        """Ask the viewer; a short batch is filled up with its last image, so that every call has the same shape."""
        if not self._places:
            return
        filling = [self._pixels[-1]] * (self._batch_size - len(self._pixels))
        for name, answers in self._viewer.look(np.stack(self._pixels + filling)).items():
            rows = self._rows[name]
            for place, row in zip(self._places, answers, strict=False):
                if rows[place] is None:  # a head may have its row of an image that another one lacks
                    rows[place] = row
                    self._answers[name].append(row)
        self._places, self._pixels = [], []

    def finish(self) -> dict[str, list[Row]]:
        """Ask for the rest and return all new answers of the part by model."""
        self._flush()
        return self._answers


def annotate(
    config: CaptioningConfig,
    workspace: Workspace,
    *,
    models: Sequence[str] | None = None,
    workers: int | None = None,
    part_index: int = 0,
    num_parts: int = 1,
    retry: bool = False,
    dry_run: bool = False,
) -> AnnotateReport:
    """Write, for each owned part, the rows of each model that are not there yet.

    models: names in config.annotate.models, default all. workers: decode processes, 0 for a thread of this one.
    retry: look again at files that could not be read or had changed.
    Raises ConfigError, ModelError (MissingExtraError), FileNotFoundError without kept parts, BrokenFractionError after
    the part that goes over the limit is written, WorkerDiedError.
    """
    chosen = _chosen_models(config, models)
    kept = list_parts(workspace.kept)
    if not kept:
        raise FileNotFoundError(f"{workspace.kept}: no parts; run `python -m sharding dedupe` first")
    owned = owned_parts(kept, part_index, num_parts)
    run = _Run(config, workspace, chosen=chosen, num_workers=_num_workers(config, workers), retry=retry)
    return run.dry(owned) if dry_run or not chosen else run.all_parts(owned)


class _Run:
    """One call of `annotate`: its models, and what it has counted so far."""

    def __init__(
        self, config: CaptioningConfig, workspace: Workspace, *, chosen: Sequence[str], num_workers: int, retry: bool
    ) -> None:
        self.config = config
        self.workspace = workspace
        self.num_workers = num_workers
        self.retry = retry
        self.settings = {name: config.annotate.models[name] for name in chosen}
        self.identities = {name: self._identify(name) for name in chosen}
        self.events = EventLog(workspace.events, stage="annotate")
        self.loaded: dict[str, ImageModel | HeadModel | RecordModel] = {}
        self.backbones: dict[BackboneSpec, Backbone] = {}
        self.started = time.monotonic()
        self.loading_seconds = self.waiting_seconds = 0.0
        self.num_parts = self.num_current = self.num_images = self.num_decodes = 0
        self.num_seen = self.num_broken = 0
        self.num_rows = Counter(dict.fromkeys(chosen, 0))
        self.num_reused: Counter[str] = Counter()
        self.without_result: Counter[str] = Counter()

    def dry(self, parts: Sequence[Path]) -> AnnotateReport:
        """Count what is to do."""
        for part in parts:
            self._plan(part)
        self.num_decodes = self.num_images
        return self._report(is_dry_run=True)

    def all_parts(self, parts: Sequence[Path]) -> AnnotateReport:
        """Do what is to do, part by part, while workers decode ahead, into the next part if need be."""
        self._write_labels()
        total = sum(read_part(part, []).num_rows for part in parts)
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
                        rows = {name: it.rows for name, it in work.models.items()}
                        batchers = {
                            name: _Batcher(viewer, rows, batch_size=batch_size)
                            for name, viewer in self._viewers(work).items()
                        }
                    self._take(work, place, prepared, batchers)
                    progress.note(waiting=f"{self.waiting_seconds / (time.monotonic() - self.started):.0%}")
                    progress.advance()
                    continue
                self._finish(work, batchers)
                batchers = {}
                progress.advance(work.num_images - len(work.places))
        return self._report(is_dry_run=False)

    # --- one part ---

    def _tasks(self, parts: Sequence[Path]) -> Iterator[tuple[tuple[PartWork, int | None], ImageTask | None]]:
        """Yield the images of each part that some model needs, and after them the part without an image."""
        min_side = self.config.annotate.min_side
        for part in parts:
            work = self._plan(part)
            viewers = self._viewers(work)
            preparers = {name: viewer.eye.preparer for name, viewer in viewers.items()}
            needed = {
                name: {place for model in viewer.models for place in work.models[model].needed}
                for name, viewer in viewers.items()
            }
            for place in work.places:
                record = work.records.slice(place, 1).to_pylist()[0]
                wanted = {name: it for name, it in preparers.items() if place in needed[name]}
                path = self._root(record["source"], part) / record["path"]
                yield (work, place), ImageTask(record["key"], path, record["num_bytes"], wanted, min_side)
            yield (work, None), None

    def _plan(self, part: Path) -> PartWork:
        work = plan_part(part, self.identities, self.workspace, retry=self.retry)
        self.num_parts += 1
        self.num_current += not work.models
        self.num_images += len(work.places)
        for name, it in work.models.items():
            self.num_rows[name] += len(it.needed)
            self.num_reused[name] += work.num_images - len(it.needed)
        return work

    def _take(self, work: PartWork, place: int, prepared: PreparedImage, batchers: Mapping[str, _Batcher]) -> None:
        self.num_decodes += prepared.num_decodes
        if prepared.status == OK:
            for name, pixels in prepared.pixels.items():
                batchers[name].add(place, pixels)
            return
        key, path = work.records.column("key")[place].as_py(), work.records.column("path")[place].as_py()
        self.without_result[prepared.status] += 1
        logger.warning("%s  %s: %s: %s", key, path, prepared.status, prepared.detail)
        self.events.write("no_result", key=key, path=path, reason=prepared.status, detail=prepared.detail)
        for name in work.looking:
            it = work.models[name]
            if it.rows[place] is None:
                it.rows[place] = empty_row(it.identity.schema, prepared.status)

    def _finish(self, work: PartWork, batchers: Mapping[str, _Batcher]) -> None:
        """Write the part of every model that lacked it, then see whether too many images are broken."""
        seen = {name: rows for batcher in batchers.values() for name, rows in batcher.finish().items()}
        for name, it in work.models.items():
            if it.identity.needs_image:
                answers = seen.get(name, [])
            else:
                model = self._load(name)
                assert isinstance(model, RecordModel)
                answers = it.rows[:] = model.annotate_records(work.records.select(list(it.identity.record_columns)))
            self.without_result.update(row["status"] for row in answers if row["status"] != OK)
            it.write(work.records.column("key"))
        if work.models:
            self.events.write("part_written", part=work.part.name, models=list(work.models), images=work.num_images)
        self.num_seen += work.num_images
        self.num_broken += work.num_broken
        limit = self.config.max_broken_fraction
        if is_too_broken(self.num_broken, self.num_seen, max_broken_fraction=limit):
            raise BrokenFractionError(
                f"{work.part}: {self.num_broken:,} of {self.num_seen:,} images up to here have no result, more than "
                f"max_broken_fraction = {limit}; reasons are in {self.workspace.events}: repair the files and add "
                "--retry, or raise the limit"
            )

    # --- models ---

    def _identify(self, name: str) -> Identity:
        settings, min_side = self.settings[name], self.config.annotate.min_side
        with _naming(name):
            identity = PLUGINS[settings.kind].identify(settings)
        if min_side is None or not identity.needs_image:
            return identity
        return replace(identity, preprocessing=f"{identity.preprocessing} min_side {min_side}")

    def _load(self, name: str) -> ImageModel | HeadModel | RecordModel:
        if name not in self.loaded:
            settings = self.settings[name]
            logger.info("loading %s: %s", name, self.identities[name].model)
            started = time.monotonic()
            with _naming(name):
                self.loaded[name] = PLUGINS[settings.kind].load(settings, device=self.config.annotate.device)
            self.loading_seconds += time.monotonic() - started
        return self.loaded[name]

    def _backbone(self, name: str, spec: BackboneSpec) -> Backbone:
        if spec not in self.backbones:
            started = time.monotonic()
            with _naming(name):
                self.backbones[spec] = spec.load(device=self.config.annotate.device)
            self.loading_seconds += time.monotonic() - started
        return self.backbones[spec]

    def _viewers(self, work: PartWork) -> dict[str, _Viewer]:
        """Return what has to see images of the part, by the first of the models that it serves."""
        models = {name: self._load(name) for name in work.looking}
        heads: dict[BackboneSpec, dict[str, HeadModel]] = {}
        viewers: dict[str, _Viewer] = {}
        for name, model in models.items():
            if isinstance(model, HeadModel):
                heads.setdefault(model.backbone, {})[name] = model
            else:
                assert isinstance(model, ImageModel), name
                viewers[name] = _Viewer(model, {}, (name,))
        for spec, of_spec in heads.items():
            first = next(iter(of_spec))
            viewers[first] = _Viewer(self._backbone(first, spec), of_spec, tuple(of_spec))
        for name, viewer in viewers.items():
            self._check_min_side(name, viewer)
        return viewers

    def _check_min_side(self, name: str, viewer: _Viewer) -> None:
        min_side, needed = self.config.annotate.min_side, viewer.eye.preparer.min_side
        if min_side is None or min_side >= needed:
            return
        if needed == FULL_SIZE:
            raise ConfigError(f"annotate.min_side: {name!r} measures the file's own pixels; leave min_side out")
        raise ConfigError(f"annotate.min_side: {min_side} is below the {needed} pixels that {name!r} looks at")

    def _write_labels(self) -> None:
        for name, identity in self.identities.items():
            if identity.labels is not None:
                path = self.workspace.annotations(name) / LABELS_FILE
                if not is_current(path, identity.digest):
                    write_part(path, identity.labels, made_from=identity.digest, metadata=identity.metadata)

    # --- the rest ---

    def _root(self, source: str, part: Path) -> Path:
        if source not in self.config.sources:
            raise ConfigError(
                f"{part}: has images of source {source!r}, which the config does not name; known: "
                f"{', '.join(self.config.sources)}"
            )
        return self.config.sources[source].root

    def _wait_for(self, stream: Iterator[Answer]) -> Answer | None:
        started, loading_before = time.monotonic(), self.loading_seconds
        answer = next(stream, None)
        # Models are loaded when the first part that needs them is planned, inside `next`.
        self.waiting_seconds += time.monotonic() - started - (self.loading_seconds - loading_before)
        return answer

    def _report(self, *, is_dry_run: bool) -> AnnotateReport:
        return AnnotateReport(
            num_parts=self.num_parts,
            num_parts_current=self.num_current,
            num_parts_written=self.num_parts - self.num_current,
            num_decodes=self.num_decodes,
            num_images=self.num_images,
            num_rows=dict(self.num_rows),
            num_rows_reused={name: number for name, number in self.num_reused.items() if number},
            without_result=dict(self.without_result),
            is_dry_run=is_dry_run,
            seconds=time.monotonic() - self.started,
            loading_seconds=self.loading_seconds,
            waiting_seconds=self.waiting_seconds,
        )


# --- helpers ---


@contextmanager
def _naming(model: str) -> Iterator[None]:
    """Make an error of a plug-in say which table of the config it is about."""
    try:
        yield
    except ModelError as error:
        error.args = (f"annotate.models.{model}: {error}",)
        raise


def _chosen_models(config: CaptioningConfig, models: Sequence[str] | None) -> list[str]:
    known = config.annotate.models
    for name in models or ():
        if name not in known:
            raise ConfigError(f"model {name!r}: unknown; annotate.models has {', '.join(known) or 'none'}")
    return list(known if models is None else dict.fromkeys(models))


def _num_workers(config: CaptioningConfig, workers: int | None) -> int:
    if workers is not None and workers < 0:
        raise ConfigError(f"workers must be 0 or more, got {workers}")
    number = workers if workers is not None else config.annotate.workers
    return default_workers() if number is None else number
