"""From metrics.jsonl to the trackers: which rows they have not got, and which of these a durable state covers.

A tracker takes a step once, and its series never goes back: a step that a kill undoes must not have reached it. So it
waits for a durable state, and the last step besides for its previews and validation.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training.alerts import Send
from training.config import RunConfig
from training.metrics_file import read_metrics
from training.preview import read_pictures
from training.run_dir import RunDir
from training.trackers import Trackers, WandB, make_trackers


class TrackerFeed:
    """Feeds the trackers of one launch. covered_step: the last step that a durable state holds; whoever saves sets it.

    wandb_id: of the run. step: where the launch begins.
    """

    def __init__(self, config: RunConfig, run_dir: RunDir, *, wandb_id: str, step: int) -> None:
        self.covered_step = step
        self._run_dir = run_dir
        made = make_trackers(config, run_dir, wandb_id=wandb_id, step=step)
        self.alert_senders: dict[str, Send] = {one.name: one.alert for one in made if isinstance(one, WandB)}
        """By name: trackers that people are told by, too."""
        self._trackers = Trackers(made, run_dir.trackers_path)
        self._rows: list[dict[str, Any]] = []
        self.read_back()

    def read_back(self) -> None:
        """Take from metrics.jsonl what the trackers have not got, in place of what was added."""
        rows = read_metrics(self._run_dir.metrics_path)
        self._rows = [row for row in rows if row["global_step"] > self._trackers.fed]

    def add(self, row: Mapping[str, Any]) -> None:
        """Take a row that was appended to metrics.jsonl."""
        self._rows.append(dict(row))

    def feed(self, *, is_complete: bool = False) -> None:
        """Hand on what is covered, rows and pictures; nothing when the trackers have it all.

        is_complete: nothing more will be said of the last step. Until then it is held back: its previews and validation
        may come only in the next launch.
        """
        if not self._rows:
            return
        up_to_step = min(self.covered_step, self._rows[-1]["global_step"] - (not is_complete))
        rows = [row for row in self._rows if row["global_step"] <= up_to_step]
        if not rows:
            return
        pictures: dict[int, dict[str, Path]] = {}
        for name in {row["chunk"] for row in rows}:
            pictures |= read_pictures(self._run_dir.previews_folder(name))
        self._trackers.feed(rows, pictures, up_to_step=up_to_step)
        self._rows = self._rows[len(rows) :]

    def close(self) -> None:
        """Hand on what is covered, then flush and close the trackers."""
        self.feed()
        self._trackers.close()
