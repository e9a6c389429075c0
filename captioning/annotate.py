"""Run every tagger, scorer and captioner over the kept images, one read and one decode per image for all of them.

Heads of one backbone share its features, too: a CLIP sees an image once, however many scorers stand on it.

For every part of workspace.kept the part of the same name in annotations/<model>/, in the same order of keys. Raw
answers only; words are made by `compose`. Batches are filled in the order of the part and the last one is filled up,
so killing a run and starting it again gives the same bytes. At most one part per device is done twice.
"""

import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

from captioning.annotate_report import AnnotateReport, Tally
from captioning.config import CaptioningConfig
from captioning.decode import default_workers
from captioning.device_loop import DeviceLoop
from captioning.images_in_tars import ALL_CHUNKS, ImagesInTars
from captioning.loaded_models import LoadedModels, identify
from captioning.part_work import PartWork, plan_part
from captioning.plugin import Identity
from captioning.taggers.base import LABELS_FILE
from sharding.chunk import chunk_folders
from sharding.config import ConfigError
from sharding.files import LEFT_OVER_SECONDS, remove_temporaries
from sharding.runlog import Progress
from sharding.schema import Workspace
from sharding.tables import is_current, list_parts, owned_parts, read_part, write_part

logger = logging.getLogger(__name__)


def annotate(
    config: CaptioningConfig,
    workspace: Workspace,
    *,
    models: Sequence[str] | None = None,
    workers: int | None = None,
    devices: Sequence[str] | None = None,
    chunks: Sequence[str] | None = None,
    part_index: int = 0,
    num_parts: int = 1,
    retry: bool = False,
    dry_run: bool = False,
) -> AnnotateReport:
    """Write, for each owned part, the rows of each model that are not there yet.

    models: names in config.annotate.models, default all. workers: decode processes of all devices together, 0 for a
    thread of this one. devices: they share the parts, default config.annotate.device. chunks: names of packed chunks,
    or "all", whose shards images are read from where they have them; done unasked when a source's folder is gone.
    retry: look again at files that could not be read or had changed.
    Raises ConfigError, ModelError (MissingExtraError), FileNotFoundError without kept parts, BrokenFractionError after
    the part that goes over the limit is written, WorkerDiedError.
    """
    chosen = _chosen_models(config, models)
    kept = list_parts(workspace.kept)
    if not kept:
        alone = " (of chunks alone make a source, with the importer webdataset, and scan it)" if chunks else ""
        raise FileNotFoundError(f"{workspace.kept}: no parts; run `python -m sharding dedupe` first{alone}")
    owned = owned_parts(kept, part_index, num_parts)
    names = list(devices or [config.annotate.device])
    identities = {name: identify(name, config.annotate) for name in chosen}
    tally = Tally(chosen, num_devices=len(names))
    parts = _Parts(config, workspace, owned, identities=identities, tally=tally, retry=retry)
    if dry_run or not chosen:
        for _ in parts:
            pass
        return tally.report(is_dry_run=True)
    for name in chosen:
        remove_temporaries(workspace.annotations(name), min_age_seconds=LEFT_OVER_SECONDS)
    _write_labels(workspace, identities | parts.taggers)
    num_workers = _num_workers(config, workers)
    stored = _images_in_tars(config, workspace, chunks)
    total = sum(read_part(part, []).num_rows for part in owned)
    with Progress(total, unit="images", title="annotate") as progress:
        parts.progress = progress
        loops = [
            DeviceLoop(
                config,
                workspace,
                models=LoadedModels(config.annotate, identities, device=name, workspace=workspace, tally=tally),
                tally=tally,
                progress=progress,
                stored=stored,
                num_workers=-(-num_workers // len(names)),
            )
            for name in names
        ]
        _run_all(loops, parts)
    return tally.report(is_dry_run=False)


class _Parts(Iterator[PartWork]):
    """Hands out what is to be done, part by part, to whoever asks next; counts what is found."""

    def __init__(
        self,
        config: CaptioningConfig,
        workspace: Workspace,
        parts: Sequence[Path],
        *,
        identities: Mapping[str, Identity],
        tally: Tally,
        retry: bool,
    ) -> None:
        self.progress: Progress | None = None
        self._remaining = iter(parts)
        self._workspace = workspace
        self._identities = identities
        self.taggers = {
            it.prompt.tagger: identities.get(it.prompt.tagger) or identify(it.prompt.tagger, config.annotate)
            for it in identities.values()
            if it.prompt is not None and it.prompt.tagger
        }
        self._tally = tally
        self._retry = retry
        self._is_stopped = threading.Event()

    def __next__(self) -> PartWork:
        with self._tally.lock:
            part = next(self._remaining, None)
            if part is None or self._is_stopped.is_set():
                raise StopIteration
            work = plan_part(part, self._identities, self._workspace, retry=self._retry, taggers=self.taggers)
            tally = self._tally
            tally.num_parts += 1
            tally.num_current += not work.models
            tally.num_images += len(work.places)
            for name, it in work.models.items():
                tally.num_rows[name] += len(it.needed)
                tally.num_reused[name] += work.num_images - len(it.needed)
            if self.progress is not None:
                self.progress.skip(work.num_images - len(work.places))
            return work

    def stop(self) -> None:
        """Hand out no more."""
        self._is_stopped.set()


def _run_all(loops: Sequence[DeviceLoop], parts: _Parts) -> None:
    """Run the loops side by side; when one fails the others finish what they have begun, then its error is raised.

    Ctrl-C does not wait for that.
    """
    if len(loops) == 1:
        loops[0].run(parts)
        return
    with ThreadPoolExecutor(len(loops), thread_name_prefix="device") as pool:
        futures = [pool.submit(loop.run, parts) for loop in loops]
        try:
            ended, _ = wait(futures, return_when=FIRST_EXCEPTION)
            if error := next((it.exception() for it in ended if it.exception()), None):
                logger.error("one device has stopped, the others finish the parts that they are at: %s", error)
        except KeyboardInterrupt:
            for loop in loops:
                loop.stop()
            raise
        finally:
            parts.stop()
    for future in futures:
        future.result()


def _write_labels(workspace: Workspace, identities: Mapping[str, Identity]) -> None:
    for name, identity in identities.items():
        if identity.labels is not None:
            path = workspace.annotations(name) / LABELS_FILE
            if not is_current(path, identity.digest):
                write_part(path, identity.labels, made_from=identity.digest, metadata=identity.metadata)


def _images_in_tars(
    config: CaptioningConfig, workspace: Workspace, chunks: Sequence[str] | None
) -> ImagesInTars | None:
    if chunks:
        return ImagesInTars.open(workspace.chunks, chunks)
    gone = [name for name, source in config.sources.items() if not source.root.exists()]
    if not gone or not chunk_folders(workspace.chunks):
        return None
    logger.info("source %s is not here; its images are read from the chunks in %s", ", ".join(gone), workspace.chunks)
    return ImagesInTars.open(workspace.chunks, [ALL_CHUNKS])


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
