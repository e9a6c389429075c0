"""What a run of `annotate` has done so far, and its report. Several devices count into one tally."""

import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class AnnotateReport:
    """What one call of `annotate` did, or with `is_dry_run` would do."""

    num_parts: int
    num_parts_current: int
    num_parts_written: int
    """Kept parts for which at least one model's part was written."""
    num_decodes: int
    num_images: int
    """Images that had to be looked at; not counted are those whose rows were current or reused."""
    num_rows: Mapping[str, int]
    """New rows by model."""
    num_rows_reused: Mapping[str, int]
    without_result: Mapping[str, int]
    """New rows without a result by reason; one for an image that no model could see."""
    is_dry_run: bool
    seconds: float
    loading_seconds: float
    """Time that loading the models and trying batch sizes took, all devices together."""
    waiting_seconds: float
    """Time in which loaded models waited for decoding, all devices together."""
    num_devices: int = 1

    def summary(self) -> str:
        """Return a few lines for people."""
        if not self.num_rows:
            return "annotate: the dataset names no models, nothing to do"
        verb = "to do" if self.is_dry_run else "done"
        lines = [
            f"annotate: {self.num_parts} parts, {self.num_parts_current} already current, {self.num_parts_written} "
            f"{verb}; {self.num_images:,} images, {self.num_decodes:,} decodes in {self.seconds:.1f} s"
        ]
        if self.num_images and not self.is_dry_run:
            device_seconds = max(self.seconds * self.num_devices - self.loading_seconds, 1e-9)
            lines[0] += (
                f"; {self.loading_seconds:.1f} s to load models, then "
                f"{self.num_images * self.num_devices / device_seconds:.1f}/s, "
                f"{self.waiting_seconds / device_seconds:.0%} of it waiting for images"
            )
        for model, number in self.num_rows.items():
            reused = self.num_rows_reused.get(model, 0)
            lines.append(f"  {model}: {number:,} rows" + (f", {reused:,} more kept" if reused else ""))
        lines += [f"  no result, {reason}: {number:,}" for reason, number in sorted(self.without_result.items())]
        return "\n".join(lines)


class Tally:
    """Counts of a run; everything is changed under `lock`."""

    def __init__(self, models: Sequence[str], *, num_devices: int) -> None:
        self.lock = threading.RLock()
        self.started = time.monotonic()
        self.num_devices = num_devices
        self.loading_seconds = self.waiting_seconds = 0.0
        self.num_parts = self.num_current = self.num_images = self.num_decodes = 0
        self.num_seen = self.num_broken = 0
        self.num_rows = Counter(dict.fromkeys(models, 0))
        self.num_reused: Counter[str] = Counter()
        self.without_result: Counter[str] = Counter()

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Count the time inside as loading."""
        started = time.monotonic()
        try:
            yield
        finally:
            with self.lock:
                self.loading_seconds += time.monotonic() - started

    def waiting_share(self) -> float:
        """Return the share of the devices' time so far in which loaded models waited for images."""
        seconds = (time.monotonic() - self.started) * self.num_devices - self.loading_seconds
        return self.waiting_seconds / max(seconds, 1e-9)

    def report(self, *, is_dry_run: bool) -> AnnotateReport:
        """Return what has been counted."""
        return AnnotateReport(
            num_parts=self.num_parts,
            num_parts_current=self.num_current,
            num_parts_written=self.num_parts - self.num_current,
            num_decodes=self.num_images if is_dry_run else self.num_decodes,
            num_images=self.num_images,
            num_rows=dict(self.num_rows),
            num_rows_reused={name: number for name, number in self.num_reused.items() if number},
            without_result=dict(self.without_result),
            is_dry_run=is_dry_run,
            seconds=time.monotonic() - self.started,
            loading_seconds=self.loading_seconds,
            waiting_seconds=self.waiting_seconds,
            num_devices=self.num_devices,
        )
