"""The batch size of a model, found by trial: it doubles until memory is full or a larger batch brings no gain.

What was found is remembered beside the model's parts, so that a run that goes on after a kill uses the same one. Rows
do not depend on it but for the last bits of floats, which any library may round otherwise in another batch.
"""

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path

from sharding.files import write_json

logger = logging.getLogger(__name__)

MEMORY_NAME = "batch_size.json"
ON_CPU = 4
"""Batch size on a CPU when none is given: larger ones gain next to nothing there."""
_LARGEST = 256
_MIN_GAIN = 1.08
"""A larger batch must be so many times faster per image to be worth its memory."""
_OUT_OF_MEMORY = ("out of memory", "failed to allocate", "bad allocation", "bad_alloc", "alloc_failed")


def find_batch_size(call: Callable[[int], object], *, name: str, clock: Callable[[], float] = time.perf_counter) -> int:
    """Return the largest batch size that pays; `call(n)` runs the model on n images.

    Each size runs twice and the second run counts, the first one warms up. Any error but one of memory is passed on,
    and so is that one with a single image.
    """
    best, best_speed, size = 0, 0.0, 1
    while size <= _LARGEST:
        try:
            call(size)
            started = clock()
            call(size)
            seconds = clock() - started
        except Exception as error:
            if not is_out_of_memory(error) or not best:
                raise
            logger.info("%s: batch size %d does not fit into memory", name, size)
            break
        speed = size / max(seconds, 1e-9)
        if best and speed < best_speed * _MIN_GAIN:
            logger.info("%s: batch size %d brings %.1f images/s, no gain", name, size, speed)
            break
        best, best_speed, size = size, speed, 2 * size
    logger.info("%s: batch size %d found by trial, %.1f images/s by itself", name, best, best_speed)
    return best


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether torch, onnxruntime or Python ran out of memory; they share no class of error."""
    text = f"{type(error).__name__} {error}".lower()
    return isinstance(error, MemoryError) or "outofmemory" in text or any(word in text for word in _OUT_OF_MEMORY)


def remembered_batch_size(folder: Path, *, made_with: str) -> int | None:
    """Return what a former run found for the same model and kind of device, if any."""
    try:
        values = json.loads((folder / MEMORY_NAME).read_text(encoding="utf-8"))
        return int(values["batch_size"]) if values["made_with"] == made_with else None
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        logger.warning("%s: not readable, so the batch size is tried again", folder / MEMORY_NAME)
        return None


def remember_batch_size(folder: Path, batch_size: int, *, made_with: str) -> None:
    """Keep it for the next run."""
    write_json(folder / MEMORY_NAME, {"made_with": made_with, "batch_size": batch_size})
