"""What packing did, in fields for programs and in lines for people."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PackReport:
    """What packing did, or with dry_run would do, in the chunks that this task owns."""

    packed: tuple[str, ...] = ()
    """Chunks whose tars were written."""
    recaptioned: tuple[str, ...] = ()
    """Chunks whose index was renewed, tars untouched."""
    num_current: int = 0
    sealed: tuple[str, ...] = ()
    """Chunks whose plan changed although a run has trained them; left as they are."""
    not_packed: tuple[str, ...] = ()
    """Chunks that need tars, which `captions_only` does not write."""
    not_planned: tuple[str, ...] = ()
    """Committed chunks that the plan does not know."""
    num_samples: int = 0
    """In `packed`."""
    num_dropped: int = 0
    """In `packed`; each has a row in pack_drops/."""
    forecast_bytes: int = 0
    """Upper estimate of what `packed` takes on disk."""
    free_bytes: int = 0
    """On the disk of the workspace, before packing."""
    unread_by: tuple[str, ...] = ()
    """What `pass_through_formats` costs, a line per format."""
    is_dry_run: bool = False

    def summary(self) -> str:
        """Return what was done, one line per kind."""
        verb = "would be packed" if self.is_dry_run else "packed"
        lines = [f"{len(self.packed):,} chunks {verb} ({self.num_samples:,} samples), {self.num_current:,} current"]
        if self.is_dry_run and self.forecast_bytes:
            fits = "" if self.forecast_bytes <= self.free_bytes else ": they do not fit"
            needed, free = (f"{count / 1e9:,.2f} GB" for count in (self.forecast_bytes, self.free_bytes))
            lines.append(f"tars: at most about {needed}, {free} are free{fits}")
        lines += self.unread_by
        if self.recaptioned:
            lines.append(f"{len(self.recaptioned):,} chunks {'would get' if self.is_dry_run else 'got'} new captions")
        if self.num_dropped:
            lines.append(f"{self.num_dropped:,} samples dropped while packing; see pack_drops/ or `report`")
        for names, what in (
            (self.not_packed, "have no current tars; run pack without --captions-only"),
            (self.sealed, "changed in the plan after a run trained them and were left as they are"),
            (self.not_planned, "are not in the plan any more; delete them if no run needs them"),
        ):
            if names:
                lines.append(f"{len(names):,} chunks {what}: {', '.join(names[:5])}{' …' if len(names) > 5 else ''}")
        return "\n".join(lines)
