"""What the page shows, as JSON values: overview, curves, previews, disk. One object per run keeps what is known."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from training.dashboard.chunk_map import chunk_map, groups
from training.dashboard.curves import binned, mean_between
from training.dashboard.disk import DiskReader, disk_text
from training.dashboard.metrics_columns import STEP, Columns, MetricsColumns
from training.dashboard.overview import Overview, OverviewReader
from training.dashboard.previews import Previews
from training.dreambooth.verdict.remedies import Remedy
from training.dreambooth.verdict.report import read_verdict
from training.ledger import Line
from training.run_dir import RunDir
from training.status import duration_text
from training.status_events import event_text
from training.status_queue import QueueReader

SPANS = {"all": None, "100": 100, "10": 10, "1": 1}
"""How many of the newest chunks the curves show; None: the whole run."""
_SAMPLED_ROWS = 900
_LEDGER_LINES = 60
_MARKED = ("failed", "rolled_back", "superseded", "extended", "skipped")
_NUM_MARKS = 200


class RunView:
    """See the module. All methods may be called from several threads; all raise as `OverviewReader.read`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.run_dir = RunDir(root)
        self.metrics = MetricsColumns(self.run_dir.metrics_path)
        self.previews = Previews(self.run_dir)
        self._reader = OverviewReader(root)
        self._disk = DiskReader(self.run_dir)
        self._queue = QueueReader(root)

    def read(self) -> Overview:
        """Return how the run is."""
        return self._reader.read(rows=self.metrics.last_rows())

    def overview(self) -> dict[str, Any]:
        """Return header, chunk map, verdict and the ledger's last lines."""
        overview = self.read()
        losses = _chunk_losses(overview, self.metrics.columns()) if self.metrics.catch_up() else {}
        squares = chunk_map(overview.campaign, live_chunk=overview.live_chunk, losses=losses)
        return {
            **header(overview),
            "groups": groups(squares),
            "verdict": _verdict(read_verdict(self.root)),
            "queue": queue.text() if (queue := self._queue.read(wait=False)) is not None else None,
            "ledger": [_shown(line) for line in overview.lines[-_LEDGER_LINES:]],
            "num_lines": len(overview.lines),
        }

    def curves(self, span: str) -> dict[str, Any]:
        """Return the curves of a span of SPANS, from what is known of metrics.jsonl, else from a sample of it."""
        overview = self.read()
        is_known = self.metrics.catch_up()
        columns = self.metrics.columns() if is_known else self.metrics.sample(_SAMPLED_ROWS)
        first = first_step(overview, SPANS[span])
        return {
            **binned(columns, first_step=first),
            "span": span,
            "known": 1 if is_known else round(self.metrics.known_fraction, 3),
            "bad_lines": self.metrics.num_bad_lines,
            "marks": _marks(overview, first),
        }

    def pictures(self) -> dict[str, Any]:
        """Return the previews."""
        return self.previews.listing(list(self.read().campaign.records))

    def disk(self) -> dict[str, Any]:
        """Return the disk's use and forecast."""
        overview = self.read()
        disk = self._disk.read(self._reader.config(), overview)
        total = disk.forecast.total if disk.forecast is not None else None
        return {
            "used": disk.used_bytes, "free": disk.free_bytes, "total": total, "is_enough": disk.is_enough,
            "text": disk_text(disk),
        }  # fmt: skip

    def parts(self) -> Mapping[str, Callable[[], dict[str, Any]]]:
        """Return what the page asks for, by name."""
        curves = {f"curves-{span}": lambda span=span: self.curves(span) for span in SPANS}
        return {"overview": self.overview, "pictures": self.pictures, "disk": self.disk, **curves}


def header(overview: Overview) -> dict[str, Any]:
    """Return what stands above all else: state, progress, speed, time left, the last launch's end."""
    current, speed, sums, eta = overview.current, overview.speed, overview.totals, overview.eta
    word, sentence = state_words(overview)
    return {
        "run_id": overview.run_id,
        "title": overview.title,
        "state": word,
        "sentence": sentence,
        "chunk": None
        if current is None
        else {"name": current.name, "step": current.steps_done, "steps": current.steps, "saved": current.saved_steps},
        "chunks_done": overview.num_done,
        "chunks": len(overview.campaign.names),
        "done_fraction": round(overview.done_fraction, 5),
        "global_step": max(sums.global_step, speed.global_step if speed is not None and current is not None else 0),
        "images": sums.images_seen,
        "images_left": eta.showings_left,
        "gpu_hours": round(overview.gpu_hours, 2 if overview.gpu_hours > 10 else 4),
        "skipped": sums.skipped_steps,
        "broken": sums.broken_images,
        "images_per_second": None if speed is None else round(speed.images_per_second, 2),
        "wait_fraction": None if speed is None else round(speed.wait_fraction, 4),
        "loss": None if speed is None else speed.loss,
        "eta_seconds": eta.seconds if eta.showings_left else None,
        "eta_text": eta_text(overview),
        "last_exit": overview.last_exit,
        "devices": list(overview.devices),
        "now": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
    }


def state_words(overview: Overview) -> tuple[str, str]:
    """Return the run's state in a word (running, failed, stopped, done, idle) and in a sentence."""
    last = next((line for line in reversed(overview.lines) if line.event in ("failed", "stopped", "chunk_done")), None)
    if overview.is_live:
        return "running", str(overview.live)
    if overview.campaign.names and overview.num_done == len(overview.campaign.names):
        return "done", "all chunks are trained"
    if overview.live is not None:
        return "failed", str(overview.live)
    if last is not None and last.event in ("failed", "stopped"):
        return last.event, event_text(last)
    return "idle", f"no launch is running; next is {overview.campaign.next or 'not known yet'}"


def eta_text(overview: Overview) -> str:
    """Return how long the rest takes: `12 d 4 h`; words when that is not known."""
    eta = overview.eta
    if overview.campaign.names and overview.campaign.next is None:
        return "nothing left"
    return "not known yet" if eta.seconds is None or not eta.showings_left else duration_text(eta.seconds)


def first_step(overview: Overview, num_chunks: int | None) -> int:
    """Return the first global step of the newest chunks that were started; 0 for the whole run."""
    live = [record for record in overview.campaign.records.values() if record.status != "superseded"]
    if num_chunks is None or len(live) <= num_chunks:
        return 0
    return live[-num_chunks].visits[-1].global_step + 1


def _verdict(verdict: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return of each concept its word and, in words, why, what is not known and what to try."""
    if verdict is None:
        return None
    concepts = [
        {
            "name": name, "word": reading["word"], "reasons": reading["reasons"], "unknown": reading["unknown"],
            "remedies": [str(Remedy(**one)) for one in reading["remedies"]],
        }
        for name, reading in verdict["concepts"].items()
    ]  # fmt: skip
    best = None if verdict["best"] is None else verdict["best"]["global_step"]
    return {"global_step": verdict["global_step"], "concepts": concepts, "best_step": best}


def _chunk_losses(overview: Overview, columns: Columns) -> dict[str, float | None]:
    live = [record for record in overview.campaign.records.values() if record.last_state is not None]
    if not columns[STEP].size:
        return {}
    spans = [(one.start_global_step, one.last_state.global_step) for one in live if one.last_state is not None]
    return dict(zip((one.chunk for one in live), mean_between(columns, "train/loss", spans), strict=True))


def _marks(overview: Overview, first: int) -> list[dict[str, Any]]:
    """Return what happened at a step, to be marked below the curves; the newest ones when there are many."""
    found = [
        {"step": line.fields["global_step"], "event": line.event, "text": event_text(line)}
        for line in overview.lines
        if line.event in _MARKED and line.fields.get("global_step", -1) >= first
    ]
    return found[-_NUM_MARKS:]


def _shown(line: Line) -> dict[str, Any]:
    return {"number": line.number, "time": line.time, "event": line.event, "text": event_text(line)}
