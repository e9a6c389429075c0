"""How large the run's folder is and gets, measured by what lies in it. Slow on network disks: kept for a while."""

import shutil
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from training.chunk_history import ChunkRecord
from training.config import RunConfig
from training.dashboard.overview import Overview
from training.forecast import DiskForecast, disk_forecast, folder_bytes
from training.run_dir import RunDir

_KEPT_SECONDS = 600.0


@dataclass(frozen=True)
class DiskUse:
    """Bytes. forecast: None before the first state; what was not measured yet (exports, previews) is not in it."""

    used_bytes: int
    free_bytes: int
    forecast: DiskForecast | None

    @property
    def is_enough(self) -> bool:
        return self.forecast is None or self.forecast.total - self.used_bytes <= self.free_bytes


class DiskReader:
    """Measures at most every ten minutes."""

    def __init__(self, run_dir: RunDir) -> None:
        self._run_dir = run_dir
        self._known: tuple[float, DiskUse] | None = None
        self._lock = threading.Lock()

    def read(self, config: RunConfig, overview: Overview) -> DiskUse:
        """Return the folder's use and its forecast."""
        with self._lock:
            if self._known is None or time.monotonic() - self._known[0] > _KEPT_SECONDS:
                self._known = time.monotonic(), self._measure(config, overview)
            return self._known[1]

    def _measure(self, config: RunConfig, overview: Overview) -> DiskUse:
        root, records = self._run_dir.root, list(overview.campaign.records.values())
        used, free = folder_bytes(root), shutil.disk_usage(root).free
        states = [root / record.last_state.path for record in records if record.last_state is not None]
        there = [path for path in states if path.is_dir()]
        if not there:
            return DiskUse(used, free, None)
        forecast = self._forecast(config, overview, records, state_bytes=folder_bytes(there[-1]))
        return DiskUse(used, free, forecast)

    def _forecast(
        self, config: RunConfig, overview: Overview, records: Sequence[ChunkRecord], *, state_bytes: int
    ) -> DiskForecast:
        index = self._run_dir.chunk_folder(records[-1].chunk) / "index.parquet"
        num_chunks = len(overview.campaign.names)
        forecast = disk_forecast(
            config,
            num_chunks=num_chunks,
            num_steps=max(record.steps for record in records),
            num_images=max(record.images_planned for record in records),
            index_bytes=index.stat().st_size if index.exists() else 0,
            num_tensors=0,
            state_bytes=state_bytes,
            num_parameters=0,
        )
        exports = [folder_bytes(path) for path in map(self._run_dir.weights_folder, overview.campaign.records)]
        drawn = [folder_bytes(path) for path in map(self._run_dir.previews_folder, overview.campaign.records)]
        previews = max(drawn, default=0) * num_chunks
        return replace(forecast, export_bytes=max(exports, default=0), preview_bytes=previews)


def disk_text(disk: DiskUse) -> str:
    """Return it in a line."""
    if disk.forecast is None:
        return f"no forecast before the first state; {disk.free_bytes / 1e9:,.0f} GB are free"
    return disk.forecast.text(free_bytes=disk.free_bytes, used_bytes=disk.used_bytes)
