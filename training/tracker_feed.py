"""From metrics.jsonl to the trackers: which rows they have not got, and which of these a durable state covers.

A tracker takes a step once, and its series never goes back: a step that a kill undoes must not have reached it. So it
waits for a durable state, and the last step besides for its previews and validation. W&B gets links to the exported
weights of finished chunks, too: whatever launch finished them.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training.alerts import Send
from training.config import RunConfig
from training.metrics_file import read_metrics
from training.preview import read_pictures
from training.run_dir import RunDir
from training.trackers import Trackers, make_trackers
from training.wandb_tracker import WandB

logger = logging.getLogger(__name__)


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
        may come only in the next launch. Then W&B gets its links to weights, too.
        """
        self._feed_rows(is_complete=is_complete)
        if is_complete and self.alert_senders:
            self._link_weights()

    def _feed_rows(self, *, is_complete: bool) -> None:
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

    def _link_weights(self) -> None:
        try:
            exports = exported_weights(self._run_dir)
        except (OSError, ValueError) as error:
            logger.warning("W&B gets no links to weights: %s; training goes on", error)
        else:
            self._trackers.link_weights(exports)

    def close(self) -> None:
        """Hand on what is covered, then flush and close the trackers."""
        self.feed()
        self._trackers.close()


def exported_weights(run_dir: RunDir) -> dict[int, tuple[str, Path]]:
    """Return chunk and folder of the weights that finished chunks left, by global step.

    Raises ValueError for a complete.json that is not valid.
    """
    found: dict[int, tuple[str, Path]] = {}
    for pattern in ("*/weights", "*/*/weights"):
        for folder in run_dir.chunks_folder.glob(pattern):
            chunk = folder.parent.relative_to(run_dir.chunks_folder).as_posix()
            if complete := run_dir.read_complete(chunk):
                found[complete["global_step"]] = (chunk, folder)
    return found
