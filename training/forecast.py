"""How large a run's folder gets: states, exported weights, previews and records, before its first step. No torch.

An upper bound for the settings as they are: all chunks are taken to be as large as the one at hand.
"""

import math
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sharding.files import size_text
from training.config import Prompt, RunConfig
from training.config.saving import SaveConfig

_BYTES_PER_TENSOR, _BYTES_PER_STATE = 400, 65_536
"""Headers and manifests beside the numbers themselves."""
_METRICS_BYTES_PER_STEP, _TENSORBOARD_BYTES_PER_STEP, _TRACE_BYTES_PER_IMAGE = 2_500, 4_000, 1_200
_LEDGER_BYTES_PER_SAVE, _RECORD_BYTES_PER_CHUNK = 1_500, 40_000
_EXPORT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class DiskForecast:
    """The most that lies in the run folder at any time, in bytes."""

    num_states: int
    state_bytes: int
    num_exports: int
    export_bytes: int
    preview_bytes: int
    record_bytes: int
    """Ledger, metrics, charts, traces, copies of indexes; over the whole run."""

    @property
    def total(self) -> int:
        states, exports = self.num_states * self.state_bytes, self.num_exports * self.export_bytes
        return states + exports + self.preview_bytes + self.record_bytes

    def text(self, *, free_bytes: int, used_bytes: int = 0) -> str:
        """Return it in a line. used_bytes: what the run folder holds already."""
        line = (
            f"the run folder grows to at most {size_text(self.total)}: {self.num_states:,} states of "
            f"{size_text(self.state_bytes)}, {self.num_exports:,} exports of {size_text(self.export_bytes)}, "
            f"previews {size_text(self.preview_bytes)}, records {size_text(self.record_bytes)}; it holds "
            f"{size_text(used_bytes)}, {size_text(free_bytes)} are free"
        )
        if self.total - used_bytes > free_bytes:
            line += "; that does not last to the end: lower save.keep_exports, save.keep_every_chunks or keep_chunks"
        return line


def disk_forecast(
    config: RunConfig,
    *,
    num_chunks: int,
    num_steps: int,
    num_images: int,
    index_bytes: int,
    num_tensors: int,
    state_bytes: int,
    num_parameters: int,
    prompts: Sequence[Prompt] = (),
) -> DiskForecast:
    """Return the forecast of a run. num_steps, num_images: of one chunk over all its epochs; index_bytes: of one chunk.

    num_tensors, state_bytes: of a state; num_parameters: that an export holds.
    prompts: those that are drawn.
    """
    save, preview, trackers = config.save, config.preview, config.trackers
    milestones = num_chunks // save.keep_every_chunks if save.keep_every_chunks else 0
    exports = math.ceil(num_chunks / save.export_every_chunks) if save.export_every_chunks else 0
    previews = num_chunks * (
        int(preview.at_chunk_end) + (num_steps // preview.every_steps if preview.every_steps else 0)
    )
    per_step = _METRICS_BYTES_PER_STEP + (_TENSORBOARD_BYTES_PER_STEP if trackers.tensorboard else 0)
    saves = num_steps // save.every_steps + 2
    records = (
        num_steps * per_step
        + (num_images * _TRACE_BYTES_PER_IMAGE if trackers.trace else 0)
        + saves * _LEDGER_BYTES_PER_SAVE
        + _RECORD_BYTES_PER_CHUNK
        + index_bytes
    )
    best = int(config.dreambooth is not None)  # the state that a verdict keeps, and weights of its chunk
    return DiskForecast(
        # in the chunk at hand those kept and the one being written; of chunks before, their final ones; and one that a
        # chunk which is trained again has from before
        num_states=save.keep_states + 1 + min(save.keep_chunks + 1, num_chunks) + milestones + best,
        state_bytes=state_bytes + num_tensors * _BYTES_PER_TENSOR + _BYTES_PER_STATE,
        num_exports=min(exports, save.keep_exports + 1 + best) if save.keep_exports else exports,
        export_bytes=export_bytes(num_parameters, num_tensors, save=save),
        preview_bytes=(previews + best) * sum(3 * prompt.width * prompt.height + 10_000 for prompt in prompts),
        record_bytes=num_chunks * records,
    )


def export_bytes(num_parameters: int, num_tensors: int, *, save: SaveConfig) -> int:
    """Return how much an export of so many weights takes, in all its formats; frozen models in them are not counted."""
    one = num_parameters * _EXPORT_BYTES[save.export_dtype] + num_tensors * _BYTES_PER_TENSOR
    return one * len(save.export_formats)


def folder_bytes(root: Path) -> int:
    """Return the size of all files below `root`; one that goes meanwhile counts nothing."""
    total = 0
    for folder, _, names in os.walk(root):
        for name in names:
            with suppress(FileNotFoundError):
                total += (Path(folder) / name).lstat().st_size
    return total
