"""Where a run stands: the counters that a state carries. No torch."""

from dataclasses import dataclass, fields, replace


@dataclass(frozen=True)
class Position:
    """Where a run stands. Counters without `chunk_` are absolute over the run."""

    chunk: str = ""
    epoch: int = 0
    step: int = 0
    """Next step of this epoch's plan."""
    global_step: int = 0
    """Position in the plan of the whole run; advances when a step is skipped."""
    applied_updates: int = 0
    images_seen: int = 0
    skipped_steps: int = 0
    broken_images: int = 0
    chunk_images_trained: int = 0
    chunk_images_skipped: int = 0
    chunk_images_broken: int = 0
    chunk_applied_updates: int = 0
    chunk_busy_seconds: float = 0.0
    """In steps; not in what a state is compared by."""

    def after_step(self, *, num_images: int, num_broken: int, is_applied: bool, seconds: float) -> "Position":
        """Return the position after a step of num_images, of which num_broken could not be read."""
        num_real = num_images - num_broken
        return replace(
            self,
            step=self.step + 1,
            global_step=self.global_step + 1,
            applied_updates=self.applied_updates + is_applied,
            images_seen=self.images_seen + (num_real if is_applied else 0),
            skipped_steps=self.skipped_steps + (not is_applied),
            broken_images=self.broken_images + num_broken,
            chunk_images_trained=self.chunk_images_trained + (num_real if is_applied else 0),
            chunk_images_skipped=self.chunk_images_skipped + (0 if is_applied else num_real),
            chunk_images_broken=self.chunk_images_broken + num_broken,
            chunk_applied_updates=self.chunk_applied_updates + is_applied,
            chunk_busy_seconds=round(self.chunk_busy_seconds + seconds, 3),
        )

    def next_epoch(self) -> "Position":
        """Return the start of the chunk's next epoch."""
        return replace(self, epoch=self.epoch + 1, step=0)

    def at_start_of(self, chunk: str) -> "Position":
        """Return the start of another chunk: the run's counters go on, the chunk's begin anew."""
        fresh = {one.name: one.default for one in fields(self) if one.name.startswith("chunk_")}
        return replace(self, chunk=chunk, epoch=0, step=0, **fresh)  # type: ignore[arg-type]
