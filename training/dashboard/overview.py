"""What a run is doing, as far as its folder alone tells: no workspace is read, so it works on any machine that sees it.

For chunks that the run has not started, as many showings are taken as the others have on average.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sharding.config import load_config
from training.campaign import Campaign
from training.chunk_records import Totals, chunk_records, totals
from training.config import RunConfig
from training.dashboard.ledger_lines import LedgerLines
from training.device_times import device_times, gpu_hours
from training.ledger import Line
from training.lock import HolderState, holder_state
from training.run_dir import RunDir
from training.stages import epochs_of
from training.status import CurrentChunk, Eta, current_chunk, eta_of
from training.status_tables import ChunkCounts

_RECENT_STEPS = 50


@dataclass(frozen=True)
class Speed:
    """Of the newest steps. images_per_second: without saves and previews."""

    images_per_second: float
    wait_fraction: float
    loss: float | None
    global_step: int


@dataclass(frozen=True)
class Overview:
    """See the module. campaign: its `chunks` are empty."""

    run_id: str
    title: str
    campaign: Campaign
    totals: Totals
    gpu_hours: float
    current: CurrentChunk | None
    eta: Eta
    live: HolderState | None
    last_exit: Mapping[str, Any] | None
    speed: Speed | None
    devices: Sequence[str]

    @property
    def lines(self) -> Sequence[Line]:
        return self.campaign.lines

    @property
    def is_live(self) -> bool:
        return self.live is not None and self.live.is_live

    @property
    def num_done(self) -> int:
        return sum(self.campaign.is_done(name) for name in self.campaign.names)

    @property
    def done_fraction(self) -> float:
        """Of the campaign's images."""
        seen, left = self.totals.images_seen, self.eta.showings_left
        return seen / (seen + left) if seen + left else 0.0

    @property
    def live_chunk(self) -> str | None:
        """The chunk that a launch is at work on now."""
        started = [line.fields["chunk"] for line in self.lines if line.event == "started"]
        return started[-1] if self.is_live and started else None


class RunNotThereError(FileNotFoundError):
    """The folder has no run yet; the message says what is missing."""


@dataclass(frozen=True)
class _Folded:
    """What follows from the ledger's lines alone. key: what it was made from."""

    key: tuple[Any, ...]
    campaign: Campaign
    totals: Totals
    gpu_hours: float
    eta: Eta


class OverviewReader:
    """Reads a run's folder again and again; only new lines of the ledger are parsed."""

    def __init__(self, root: Path) -> None:
        self.run_dir = RunDir(root)
        self._lines = LedgerLines(self.run_dir.ledger_path)
        self._config: tuple[int, RunConfig] | None = None
        self._folded: _Folded | None = None

    def read(self, *, rows: Sequence[Mapping[str, Any]]) -> Overview:
        """Return how the run is. rows: the newest of metrics.jsonl.

        Raises RunNotThereError before its first launch, LedgerError, ConfigError for damage.
        """
        run_dir, config, known = self.run_dir, self.config(), self.run_dir.read_run_json()
        folded = self._fold(config, self._lines.read(), known.get("chunks", ()))
        campaign = folded.campaign
        return Overview(
            run_id=str(known.get("run_id", run_dir.root.absolute().name)),
            title=config.name or run_dir.root.absolute().name,
            campaign=campaign,
            totals=folded.totals,
            gpu_hours=folded.gpu_hours,
            current=current_chunk(campaign, run_dir),
            eta=folded.eta,
            live=holder_state(run_dir.lock_path),
            last_exit=run_dir.read_last_exit(),
            speed=speed_of(rows),
            devices=tuple(dict.fromkeys(name for record in campaign.records.values() for name in record.devices)),
        )

    def _fold(self, config: RunConfig, lines: Sequence[Line], known_chunks: Sequence[str]) -> "_Folded":
        """Return what follows from the ledger; the same as the last time while nothing in it is new."""
        key = (id(config), len(lines), lines[-1].hash if lines else "", tuple(known_chunks))
        if self._folded is None or self._folded.key != key:
            records = chunk_records(lines)
            names = tuple(dict.fromkeys([*known_chunks, *records]))
            campaign = Campaign(names, {}, tuple(lines), records, epochs_of(config))
            eta = eta_of(campaign, _estimated_counts(campaign))
            self._folded = _Folded(key, campaign, totals(lines), gpu_hours(device_times(lines)), eta)
        return self._folded

    def config(self) -> RunConfig:
        """Return the run's frozen settings. Raises RunNotThereError."""
        path = self.run_dir.config_path
        try:
            changed = path.stat().st_mtime_ns
        except FileNotFoundError as error:
            raise RunNotThereError(f"{path}: not there: no run was started in {self.run_dir.root} yet") from error
        if self._config is None or self._config[0] != changed:
            self._config = changed, load_config(path, RunConfig, [])
        return self._config[1]


def _estimated_counts(campaign: Campaign) -> dict[str, ChunkCounts]:
    of_one_epoch = [record.images_planned // max(record.epochs, 1) for record in campaign.records.values()]
    mean = round(statistics.fmean(of_one_epoch)) if of_one_epoch else 0
    known = {name: record.images_planned // max(record.epochs, 1) for name, record in campaign.records.items()}
    return {name: ChunkCounts({}, {}, known.get(name, mean)) for name in campaign.names}


def speed_of(rows: Sequence[Mapping[str, Any]]) -> Speed | None:
    """Return the speed over the last steps of metrics.jsonl; None when they have none."""
    steps = [row for row in rows if "speed/images_per_second" in row and "speed/step_seconds" in row][-_RECENT_STEPS:]
    seconds = sum(row["speed/step_seconds"] for row in steps)
    if seconds <= 0:
        return None
    images = sum(row["speed/images_per_second"] * row["speed/step_seconds"] for row in steps)
    waited = sum(row.get("data/wait_seconds", 0.0) for row in steps)
    loss = steps[-1].get("train/loss_average", steps[-1].get("train/loss"))
    return Speed(images / seconds, waited / seconds, loss, steps[-1]["global_step"])
