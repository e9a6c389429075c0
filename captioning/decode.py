"""Read and decode each image once, for all models, in worker processes, in order.

What comes back is small: the pixels each model wants, never the decoded picture. At most `window` images are in
flight, so memory is bounded whichever side is slower. An image that kills its worker costs only itself.
"""

import logging
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar

import numpy.typing as npt
from PIL import Image

from captioning.images_in_tars import ImageInTar
from captioning.plugin import OK, FilePreparer, Preparer
from sharding import files, images

logger = logging.getLogger(__name__)

T = TypeVar("T")

OUT_OF_MEMORY = "out_of_memory"
WORKER_DIED = "worker_died"
"""The process that decoded the image died, alone, too: killed for want of memory, or by a mistake in a codec."""
UNREADABLE = ("unreadable", "changed_since_scan", OUT_OF_MEMORY, WORKER_DIED)
"""Statuses that say nothing about the picture itself; such rows are made again when the part's records change."""
_MOST_DEATHS = 3
"""So many images in a row that each kill a process of their own are no fault of theirs."""


class WorkerDiedError(RuntimeError):
    """Decode processes end without an answer whatever they are given."""


@dataclass(frozen=True)
class ImageTask:
    """One image to decode, and what to make of it."""

    key: str
    path: Path
    """Of a file, or of a member of a tar: TAR/MEMBER."""
    num_bytes: int
    """Size the scan saw; another size now means that the file is not the one with this key."""
    preparers: Mapping[str, Preparer]
    """By who looks: a model, or the backbone of several."""
    min_side: int | None = None
    """As in `images.decode_rgb`."""
    stored: ImageInTar | None = None
    """Where a shard has the image; then the file is not read."""


@dataclass(frozen=True)
class PreparedImage:
    """The answer to an ImageTask. pixels: what was prepared, by who looks; empty unless `status` is ok."""

    status: str
    num_decodes: int
    detail: str = ""
    pixels: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)


def prepare_image(task: ImageTask) -> PreparedImage:
    """Read, decode and prepare one image; whatever is wrong with it becomes its status."""
    try:
        data = task.stored.read() if task.stored else files.read_file(task.path)
    except OSError as error:
        path = task.stored.tar if task.stored else task.path
        return PreparedImage("unreadable", 0, detail=f"{path}: {error.strerror}")
    if task.stored is None and len(data) != task.num_bytes:
        return PreparedImage("changed_since_scan", 0, detail=f"{len(data)} bytes, {task.num_bytes} when scanned")
    if task.stored is not None and not task.stored.is_whole(data):
        return PreparedImage("unreadable", 0, detail=f"{task.stored.tar}: not the bytes that the index names")
    try:
        image = images.decode_rgb(data, min_side=task.min_side)
    except images.ImageError as error:
        return PreparedImage(error.reason, 1, detail=error.detail)
    try:
        made = {it: _prepare(it, data, image) for it in set(task.preparers.values())}
    except MemoryError:  # a strip of 10 x 60,000 pixels, enlarged to 224 x 1,344,000
        return PreparedImage(OUT_OF_MEMORY, 1, detail=f"preparing {image.width}x{image.height} pixels")
    except Exception as error:  # a mistake of the preparer's, but one must know which picture shows it
        error.add_note(f"while preparing {task.key} {task.path}")
        raise
    return PreparedImage(OK, 1, pixels={name: made[it] for name, it in task.preparers.items()})


def _prepare(preparer: Preparer, data: bytes, image: Image.Image) -> npt.NDArray[Any]:
    if isinstance(preparer, FilePreparer):
        return preparer.prepare_file(data, image)
    return preparer.prepare(image)


@dataclass
class _InFlight(Generic[T]):
    """A task that was handed out, and its answer; None is the answer where there is no task."""

    companion: T
    task: ImageTask | None
    future: "Future[PreparedImage | None]"

    @property
    def is_lost(self) -> bool:
        """Whether its worker died, or one died before it was looked at."""
        return self.future.done() and isinstance(self.future.exception(), BrokenProcessPool)


class Decoders:
    """Decode processes, or one thread of this process for workers = 0.

    Use as a context manager; left by an error, it does not wait for pictures that are being decoded.
    """

    def __init__(self, workers: int, *, batch_size: int) -> None:
        self.workers = workers
        self.window = 2 * max(workers, 1) + 2 * batch_size
        self._reader, self._writer = multiprocessing.Pipe(duplex=False)
        self._pool = self._open_pool(workers)
        self._killers: list[str] = []

    def __enter__(self) -> "Decoders":
        return self

    def widen(self, batch_size: int) -> None:
        """Let more images be in flight for a larger batch, found after the start."""
        self.window = max(self.window, 2 * max(self.workers, 1) + 2 * batch_size)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._writer.close()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._writer.close()
        self._reader.close()

    def in_order(self, items: Iterable[tuple[T, ImageTask | None]]) -> Iterator[tuple[T, PreparedImage | None]]:
        """Yield (what came with the task, its answer) in the order of the tasks; without a task there is no answer.

        When a worker dies, the images that it may have been at are decoded one at a time. Raises WorkerDiedError.
        """
        waiting: deque[_InFlight[T]] = deque()
        remaining = iter(items)
        while True:
            while len(waiting) < self.window and (item := next(remaining, None)) is not None:
                waiting.append(_InFlight(*item, self._submit(item[1])))
            if not waiting:
                return
            wait([waiting[0].future])
            if waiting[0].is_lost:
                self._recover([it for it in waiting if it.task is not None])
                continue
            first = waiting.popleft()
            yield first.companion, first.future.result()

    def _submit(self, task: ImageTask | None) -> "Future[PreparedImage | None]":
        if task is not None:
            try:
                return self._pool.submit(prepare_image, task)
            except BrokenProcessPool as error:
                return _answered(error)
        return _answered(None)

    def _recover(self, waiting: Sequence[_InFlight[T]]) -> None:
        """Open new workers for the dead ones; the images that these may have been at are decoded alone first."""
        self._pool.shutdown()  # only then are all futures told
        lost = [it for it in waiting if it.is_lost]
        suspects = lost[: 2 * self.workers]
        logger.warning(
            "a decode worker died (killed for want of memory?); %d images are decoded one at a time, then it goes on",
            len(suspects),
        )
        self._pool = self._open_pool(1)
        for it in suspects:
            it.future = self._submit(it.task)
            wait([it.future])
            if it.is_lost:
                self._note_killer(it.task)
                it.future = _answered(PreparedImage(WORKER_DIED, 0, detail="the process that decoded it died"))
                self._pool = self._open_pool(1)
            else:
                self._killers.clear()
        self._pool.shutdown()
        self._pool = self._open_pool(self.workers)
        for it in lost[len(suspects) :]:
            it.future = self._submit(it.task)

    def _note_killer(self, task: ImageTask | None) -> None:
        self._killers += [task.key] if task else []
        if len(self._killers) == _MOST_DEATHS:
            raise WorkerDiedError(
                f"decode workers died (killed for want of memory?) at the images {', '.join(self._killers)}, one after "
                "the other and each alone; run the same command again with more memory or fewer --workers"
            )

    def _open_pool(self, workers: int) -> Executor:
        if not workers:
            return ThreadPoolExecutor(1, thread_name_prefix="decode")
        # Not fork: this process holds the threads of torch and onnxruntime.
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with, initargs=(self._reader,))


def _answered(answer: PreparedImage | BrokenProcessPool | None) -> "Future[PreparedImage | None]":
    future: Future[PreparedImage | None] = Future()
    if isinstance(answer, BrokenProcessPool):
        future.set_exception(answer)
    else:
        future.set_result(answer)
    return future


def default_workers() -> int:
    """Return the number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _end_with(parent: Connection) -> None:
    """Make a worker end when the other end of `parent` is closed, by its parent or by the parent's death.

    Left alone by a killed parent it would wait for ever; and a slow picture would keep a parent that wants to end.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends the workers

    def watch() -> None:
        wait_for([parent])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
