"""Data processes: start them, keep them through signals that are not theirs, start them again when one is killed.

What they load is `training.chunk_data`'s; a killed worker changes nothing of it.
"""

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing import resource_tracker
from multiprocessing.context import BaseContext
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset, Subset
from torch.utils.data._utils import signal_handling

from sharding.chunk import ChunkError
from training.errors import LostWorkerError
from training.loading.batch import Batch

logger = logging.getLogger(__name__)

MAX_RESTARTS = 3
"""Of one loader: a machine that kills workers again and again needs other settings."""
_END_SECONDS = 5.0
_PRELOADED = "training.chunk_data"
_STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)
)


class Data(Protocol):
    """Micro-batches by number, always the same ones."""

    def __len__(self) -> int: ...

    def __getitem__(self, item: int) -> Batch: ...


class Loader(Iterator[Batch]):
    """Gives the batches of `data` in order, once. Workers start when it is made.

    A worker that is killed (by the kernel when memory runs out, mostly) costs a warning and some seconds: workers start
    again at the first batch that was not given yet, and give what they would have given. The fourth time,
    LostWorkerError says what to do. Errors in workers are raised as they are in this process.
    """

    def __init__(self, data: Data, *, workers: int, prefetch: int = 2) -> None:
        self._data, self._workers, self._prefetch = data, workers, prefetch
        self._given = self._restarts = 0
        self._batches = self._start()

    def __next__(self) -> Batch:
        while True:
            try:
                batch: Batch | ChunkError = next(self._batches)
                break
            except (RuntimeError, OSError, EOFError) as error:
                self._restart_after(error)
        if isinstance(batch, ChunkError):
            self.close()
            raise batch
        self._given += 1
        return batch

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the workers, dead ones too."""
        return [worker.pid for worker in self._processes()]

    def close(self) -> None:
        """End the workers; the loader gives nothing more."""
        batches: Any = self._batches
        self._batches = iter(())
        if not hasattr(batches, "_workers") or batches._shutdown:
            return
        # Killed, not asked: asking takes a lock that a worker which was killed may have died with, and would wait for
        # ever. Workers hold nothing that has to be put away. Nor is it left to garbage collection: an error that is
        # being handled holds the iterator.
        batches._shutdown = True
        signal_handling._remove_worker_pids(id(batches))  # type: ignore[attr-defined]
        batches._worker_pids_set = False
        for worker in batches._workers:
            worker.kill()
        for worker in batches._workers:
            worker.join(_END_SECONDS)
        for queue in batches._index_queues:
            queue.cancel_join_thread()
            queue.close()

    def _start(self) -> Iterator[Any]:
        rest = Subset(_Returning(self._data), range(self._given, len(self._data)))
        return iter(
            DataLoader(
                rest,
                batch_size=None,
                shuffle=False,
                num_workers=self._workers,
                prefetch_factor=self._prefetch if self._workers else None,
                multiprocessing_context=_worker_context() if self._workers else None,
                worker_init_fn=start_worker,
                # Without a generator of its own the loader draws its base seed from torch's global one.
                generator=torch.Generator(),
            )
        )

    def _restart_after(self, error: Exception) -> None:
        """Start the workers again if `error` came of one that is dead; else raise it."""
        if self._workers and not isinstance(error, RuntimeError):
            time.sleep(0.5)  # a broken connection is seen before the death behind it
        dead = [worker for worker in self._processes() if not worker.is_alive()]
        if not dead:
            raise error
        self._restarts += 1
        how = f"loader worker {dead[0].pid} died ({_exit_text(dead[0].exitcode)})"
        if self._restarts > MAX_RESTARTS:
            self.close()
            raise LostWorkerError(
                f"{how}, for the {self._restarts}th time in this chunk: see what it printed above; where memory ran "
                "out or the job's limit is too low, lower data.workers or data.prefetch (both are free), or give it "
                "more. The last saved state is intact: run the same command again"
            ) from error
        logger.warning(
            "%s; starting workers again at the next micro-batch (%d of %d times)", how, self._restarts, MAX_RESTARTS
        )
        self.close()
        self._batches = self._start()

    def _processes(self) -> list[Any]:
        return getattr(self._batches, "_workers", [])


def make_loader(data: Data, *, workers: int, prefetch: int = 2) -> Loader:
    """Return a loader that gives the batches of `data` in order.

    workers: data processes; 0 loads in this process. prefetch: batches each worker keeps ready.

    Workers are forked from a server that has imported `training.chunk_data`, not from this process: forking one with
    CUDA and threads can deadlock, and spawning each one costs 2.5 s of imports. The first loader of a process pays
    those once, in the background from this call on; later ones start in 0.05 s. SIGINT, SIGTERM and SIGUSR1/2, which
    Slurm sends to every process of a job, do not end them: the training process alone decides when to stop.
    """
    return Loader(data, workers=workers, prefetch=prefetch)


class _Returning(Dataset[Any]):
    """Gives an error about data back instead of raising it: torch would wrap its message in a traceback."""

    def __init__(self, data: Data) -> None:
        self._data = data

    def __getitem__(self, item: int) -> Batch | ChunkError:
        try:
            return self._data[item]
        except ChunkError as error:
            return error


def _exit_text(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    return f"{name}, as the kernel sends it when memory runs out" if name == "SIGKILL" else name


def start_worker(worker: int) -> None:
    """Prepare a worker process: one thread, deaf to stop signals that do not come from the training process."""
    torch.set_num_threads(1)
    for number in _STOP_SIGNALS:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigtimedwait"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_the_training_process, daemon=True).start()


def _end_with_the_training_process() -> None:
    """End this worker when its training process is gone or sends SIGTERM.

    torch's own watch looks at the fork server, which lives as long as its workers: after a kill -9 of the training
    process all would stay for ever. And were SIGTERM ignored altogether, a training process that exits would hang:
    it ends its workers with one and then waits for them.
    """
    training_process = multiprocessing.parent_process()
    assert training_process is not None
    while training_process.is_alive():
        received = signal.sigtimedwait({signal.SIGTERM}, 1.0)
        if received is not None and received.si_pid == training_process.pid:
            break
    os._exit(128 + signal.SIGTERM)


def _worker_context() -> BaseContext:
    if sys.platform == "win32":
        return multiprocessing.get_context("spawn")
    from multiprocessing import forkserver

    forkserver.set_forkserver_preload([_PRELOADED])
    # The server inherits the blocked signals and so does every worker before `start_worker` runs: a signal to the
    # whole process group would otherwise end the server, and with it all workers. The tracker comes first because
    # starting it unblocks.
    resource_tracker.ensure_running()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return multiprocessing.get_context("forkserver")
