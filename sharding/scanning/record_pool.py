"""Make records in worker processes, in order, and survive a file that kills its process.

What a record is, is `record`'s; processes are `workers`'.
"""

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from sharding.scanning.record import FileTask, Rules, make_record
from sharding.workers import make_pool

logger = logging.getLogger(__name__)

_FILES_PER_BATCH = 16


def _make_batch(tasks: Sequence[FileTask], rules: Rules) -> list[dict[str, Any]]:
    return [make_record(task, rules) for task in tasks]


class RecordPool:
    """Makes records in order, in processes or (workers = 0) here. A file that kills its process costs only itself.

    Use as a context manager.
    """

    def __init__(self, workers: int, rules: Rules) -> None:
        self.workers = workers
        self.rules = rules
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "RecordPool":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._close()

    def records(self, tasks: Sequence[FileTask]) -> Iterator[dict[str, Any]]:
        if self.workers == 0:
            yield from (make_record(task, self.rules) for task in tasks)
            return
        batches = [tasks[start : start + _FILES_PER_BATCH] for start in range(0, len(tasks), _FILES_PER_BATCH)]
        while batches:
            futures = [self._submit(batch) for batch in batches]
            num_done = 0
            for batch, future in zip(batches, futures, strict=True):
                num_done += 1
                try:
                    if future is None:
                        raise BrokenProcessPool
                    yield from future.result()
                except BrokenProcessPool:
                    self._close()
                    yield from [self._record_alone(task) for task in batch]
                    self._close()
                    break  # what was in flight is lost: hand it in again
            batches = batches[num_done:]

    def _submit(self, batch: Sequence[FileTask]) -> Future[list[dict[str, Any]]] | None:
        try:
            return self._open(self.workers).submit(_make_batch, batch, self.rules)
        except BrokenProcessPool:
            return None  # a batch before it killed a process while this one was handed in

    def _record_alone(self, task: FileTask) -> dict[str, Any]:
        try:
            return self._open(1).submit(_make_batch, [task], self.rules).result()[0]
        except BrokenProcessPool:
            self._close()
            logger.warning("%s/%s killed the process that decoded it", task.source, task.path)
            return make_record(task, self.rules, decode=False)

    def _open(self, workers: int) -> ProcessPoolExecutor:
        if self._pool is None:
            self._pool = make_pool(workers)
        return self._pool

    def _close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
