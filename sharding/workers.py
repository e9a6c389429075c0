"""Worker processes: they start cheaply, without the parent's memory, and end when the parent is killed.

Knows nothing of what they do.
"""

import multiprocessing
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager


def make_pool(workers: int) -> ProcessPoolExecutor:
    """Return a pool of `workers` processes (at least 1). The caller shuts it down."""
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    return ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context(method), initializer=_end_with_parent
    )  # fmt: skip


@contextmanager
def open_pool(workers: int) -> Iterator[ProcessPoolExecutor | None]:
    """Yield a pool, or None for 0 workers: then the work is done in this process."""
    if workers == 0:
        yield None
        return
    with make_pool(workers) as pool:
        yield pool


def _end_with_parent() -> None:
    """End this worker when its parent is killed; without this it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
