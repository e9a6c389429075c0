"""Read and decode each image once, for all models, in worker processes, in order.

What comes back is small: the pixels each model wants, never the decoded picture. At most `window` images are in
flight, so memory is bounded whichever side is slower. A worker that dies ends the run with an error, never a hang.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import connection
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy.typing as npt
from PIL import Image

from captioning.images_in_tars import ImageInTar
from captioning.plugin import OK, FilePreparer, Preparer
from sharding import files, images

T = TypeVar("T")

UNREADABLE = ("unreadable", "changed_since_scan")
"""Statuses that say nothing about the picture itself; such rows are made again when the part's records change."""


class WorkerDiedError(RuntimeError):
    """A decode process ended without an answer, most likely killed for want of memory."""


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
    except Exception as error:  # a mistake of the preparer's, but one must know which picture shows it
        error.add_note(f"while preparing {task.key} {task.path}")
        raise
    return PreparedImage(OK, 1, pixels={name: made[it] for name, it in task.preparers.items()})


def _prepare(preparer: Preparer, data: bytes, image: Image.Image) -> npt.NDArray[Any]:
    if isinstance(preparer, FilePreparer):
        return preparer.prepare_file(data, image)
    return preparer.prepare(image)


class Decoders:
    """Decode processes, or one thread of this process for workers = 0. Use as a context manager."""

    def __init__(self, workers: int, *, batch_size: int) -> None:
        self.workers = workers
        self.window = 2 * max(workers, 1) + 2 * batch_size
        self._pool: Executor
        if workers:
            # Not fork: this process holds the threads of torch and onnxruntime.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent)
        else:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="decode")

    def __enter__(self) -> "Decoders":
        return self

    def widen(self, batch_size: int) -> None:
        """Let more images be in flight for a larger batch, found after the start."""
        self.window = max(self.window, 2 * max(self.workers, 1) + 2 * batch_size)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def in_order(self, items: Iterable[tuple[T, ImageTask | None]]) -> Iterator[tuple[T, PreparedImage | None]]:
        """Yield (what came with the task, its answer) in the order of the tasks; without a task there is no answer.

        Raises WorkerDiedError.
        """
        waiting: deque[tuple[T, ImageTask | None, Future[PreparedImage] | None]] = deque()
        remaining = iter(items)
        while True:
            try:
                while len(waiting) < self.window and (item := next(remaining, None)) is not None:
                    companion, task = item
                    waiting.append((companion, task, self._pool.submit(prepare_image, task) if task else None))
                if not waiting:
                    return
                companion, _, future = waiting[0]
                prepared = future.result() if future is not None else None
            except BrokenProcessPool as error:
                keys = [task.key for _, task, future in waiting if task is not None and not _is_answered(future)]
                raise WorkerDiedError(
                    "a decode worker died (killed for want of memory?) at or near the images "
                    f"{', '.join(keys[: self.workers + 1])}; run the same command again, with fewer --workers if it "
                    "happens again"
                ) from error
            waiting.popleft()
            yield companion, prepared


def _is_answered(future: "Future[PreparedImage] | None") -> bool:
    return future is not None and future.done() and future.exception() is None


def default_workers() -> int:
    """Return the number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _end_with_parent() -> None:
    """Make a worker end with its parent, and only then; left alone by a killed one it would wait for ever."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    sentinel = parent.sentinel
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends the workers

    def watch() -> None:
        connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
