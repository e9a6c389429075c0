"""One device at work: parts, one after the other, while decode workers are ahead, into the next part if need be.

Several loops share the parts of a run; each has its own models and its own decoders.
"""

import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

from captioning.annotate_report import Tally
from captioning.config import CaptioningConfig
from captioning.decode import Decoders, ImageTask, PreparedImage
from captioning.images_in_tars import ImagesInTars
from captioning.loaded_models import LoadedModels
from captioning.part_work import PartWork
from captioning.plugin import OK, Pixels, RecordModel, empty_row
from captioning.viewers import Batcher, Viewer
from sharding.config import ConfigError
from sharding.images import BrokenFractionError, is_too_broken
from sharding.runlog import EventLog, Progress
from sharding.schema import Workspace

logger = logging.getLogger(__name__)

Answer: TypeAlias = tuple[tuple[PartWork, int | None], PreparedImage | None]
"""A part, the place of an image in it, and that image; at the end of the part neither place nor image."""


class StoppedError(RuntimeError):
    """`DeviceLoop.stop` was called."""


class DeviceLoop:
    """Runs the models on one device over the parts it is given. Raises what `annotate` raises."""

    def __init__(
        self,
        config: CaptioningConfig,
        workspace: Workspace,
        *,
        models: LoadedModels,
        tally: Tally,
        progress: Progress,
        stored: ImagesInTars | None,
        num_workers: int,
    ) -> None:
        self._config = config
        self._workspace = workspace
        self._models = models
        self._tally = tally
        self._progress = progress
        self._stored = stored
        self._num_workers = num_workers
        self._events = EventLog(workspace.events, stage="annotate")
        self._decoders: Decoders | None = None
        self._is_stopped = False

    def stop(self) -> None:
        """Make `run`, in another thread, raise StoppedError at the next image; unfinished parts are left undone."""
        self._is_stopped = True

    def run(self, works: Iterator[PartWork]) -> None:
        """Do what is to do in the parts that `works` hands out, until it has no more."""
        given = self._config.annotate.batch_size
        batchers: dict[str, Batcher] = {}
        with Decoders(self._num_workers, batch_size=given if isinstance(given, int) else 1) as self._decoders:
            stream = self._decoders.in_order(self._tasks(works))
            while (item := self._wait_for(stream)) is not None:
                if self._is_stopped:
                    raise StoppedError
                (work, place), prepared = item
                if prepared is None or place is None:
                    self._finish(work, batchers)
                    batchers = {}
                    continue
                if not batchers:
                    batchers = {
                        name: Batcher(viewer, work.models, keys=work.keys, batch_size_of=self._batch_size_of)
                        for name, viewer in self._models.viewers(work).items()
                    }
                self._take(work, place, prepared, batchers)

    def _tasks(self, works: Iterator[PartWork]) -> Iterator[tuple[tuple[PartWork, int | None], ImageTask | None]]:
        """Yield the images of each part that some model needs, and after them the part without an image."""
        min_side = self._config.annotate.min_side
        for work in works:
            viewers = self._models.viewers(work)
            preparers = {name: viewer.eye.preparer for name, viewer in viewers.items()}
            needed = {
                name: {place for model in viewer.models for place in work.models[model].needed}
                for name, viewer in viewers.items()
            }
            stored = self._stored.find(work.keys) if self._stored and work.places else {}
            for place in work.places:
                record = work.records.slice(place, 1).to_pylist()[0]
                wanted = {name: it for name, it in preparers.items() if place in needed[name]}
                path = self._path(work, record["source"], record["path"])
                key = record["key"]
                yield (work, place), ImageTask(key, path, record["num_bytes"], wanted, min_side, stored.get(key))
            yield (work, None), None

    def _path(self, work: PartWork, source: str, path: str) -> Path:
        if source not in self._config.sources:
            raise ConfigError(
                f"{work.part}: has images of source {source!r}, which the config does not name; known: "
                f"{', '.join(self._config.sources)}"
            )
        return self._config.sources[source].root / path

    def _batch_size_of(self, viewer: Viewer, pixels: Pixels, prompt: str) -> int:
        size = self._models.batch_size_of(viewer, pixels, prompt)
        assert self._decoders is not None
        self._decoders.widen(size)
        return size

    def _wait_for(self, stream: Iterator[Answer]) -> Answer | None:
        started, loading_before = time.monotonic(), self._tally.loading_seconds
        answer = next(stream, None)
        # Models are loaded when the first part that needs them is planned, inside `next`.
        loading = self._tally.loading_seconds - loading_before
        with self._tally.lock:
            self._tally.waiting_seconds += max(time.monotonic() - started - loading, 0)
        return answer

    def _take(self, work: PartWork, place: int, prepared: PreparedImage, batchers: Mapping[str, Batcher]) -> None:
        if prepared.status == OK:
            for name, pixels in prepared.pixels.items():
                batchers[name].add(place, pixels)
        else:
            key, path = work.records.column("key")[place].as_py(), work.records.column("path")[place].as_py()
            logger.warning("%s  %s: %s: %s", key, path, prepared.status, prepared.detail)
            self._events.write("no_result", key=key, path=path, reason=prepared.status, detail=prepared.detail)
            for name in work.looking:
                it = work.models[name]
                if it.rows[place] is None:
                    it.rows[place] = empty_row(it.identity.schema, prepared.status)
        with self._tally.lock:
            self._tally.num_decodes += prepared.num_decodes
            self._tally.without_result.update([prepared.status] if prepared.status != OK else [])
            self._progress.note(waiting=f"{self._tally.waiting_share():.0%}")
            self._progress.advance()

    def _finish(self, work: PartWork, batchers: Mapping[str, Batcher]) -> None:
        """Write the part of every model that lacked it, then see whether too many images are broken."""
        in_order = sorted(batchers.values(), key=lambda it: it.waits_for_others)
        seen = {name: rows for batcher in in_order for name, rows in batcher.finish().items()}
        for name, it in work.models.items():
            if it.identity.needs_image:
                answers = seen.get(name, [])
            else:
                model = self._models.load(name)
                assert isinstance(model, RecordModel)
                answers = it.rows[:] = model.annotate_records(work.records.select(list(it.identity.record_columns)))
            with self._tally.lock:
                self._tally.without_result.update(row["status"] for row in answers if row["status"] != OK)
            it.write(work.records.column("key"))
        if work.models:
            self._events.write("part_written", part=work.part.name, models=list(work.models), images=work.num_images)
        self._check_broken(work)

    def _check_broken(self, work: PartWork) -> None:
        with self._tally.lock:
            self._tally.num_seen += work.num_images
            self._tally.num_broken += work.num_broken
            num_broken, num_seen = self._tally.num_broken, self._tally.num_seen
        limit = self._config.max_broken_fraction
        if is_too_broken(num_broken, num_seen, max_broken_fraction=limit):
            raise BrokenFractionError(
                f"{work.part}: {num_broken:,} of {num_seen:,} images up to here have no result, more than "
                f"max_broken_fraction = {limit}; reasons are in {self._workspace.events}: repair the files and add "
                "--retry, or raise the limit"
            )
