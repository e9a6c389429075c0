"""Weights & Biases as a tracker: a series of steps, alerts, and links to exported weights.

What it gets and when is `training.trackers`' matter; what an offline launch left is read by `training.wandb_file`.
"""

import logging
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from training.alerts import Alert
from training.wandb_file import last_step, last_weights_step

logger = logging.getLogger(__name__)

STEP_KEY = "global_step"
IMAGES_SEEN_KEY = "train/images_seen"
_LINK_SECONDS = 30.0
"""So long training waits for W&B to take a link: the other ranks wait, too."""


class WandB:
    """One W&B run over all launches, by its id. Offline mode writes files to sync later."""

    name = "wandb"
    is_kept = False

    def __init__(
        self, folder: Path, *, project: str, run_name: str, run_id: str, mode: Literal["online", "offline"], config: Any
    ) -> None:
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        self._earlier = sorted(folder.rglob(f"run-{run_id}.wandb"), key=lambda path: path.stat().st_mtime)
        self._is_offline = mode == "offline"
        self._wandb = wandb
        self._run = wandb.init(
            project=project, name=run_name, id=run_id, dir=str(folder), mode=mode, resume="allow", config=config,
            allow_val_change=True,
        )  # fmt: skip
        self._run.define_metric(STEP_KEY)
        self._run.define_metric(IMAGES_SEEN_KEY)  # may be chosen as the x axis
        self._run.define_metric("*", step_metric=STEP_KEY)

    def point(self, step: int, values: Mapping[str, float], pictures: Mapping[str, Image.Image]) -> None:
        drawn = {name: self._wandb.Image(picture) for name, picture in pictures.items()}
        self._run.log({**values, **drawn, STEP_KEY: step}, step=step)

    def alert(self, alert: Alert) -> None:
        """Have W&B tell people; offline it is told when the files are synced."""
        level = "INFO" if alert.kind == "campaign_done" else "ERROR" if alert.kind == "failed" else "WARN"
        self._run.alert(title=f"{alert.run}: {alert.kind.replace('_', ' ')}", text=alert.text, level=level)

    def link_weights(self, folder: Path, *, chunk: str, step: int) -> None:
        """Log an artefact that refers to exported weights where they lie: none is read, copied or sent.

        Its versions are the run's exports, by the aliases `newest-0005` and `step-41216`. What fails is logged.
        """
        linking = threading.Thread(target=self._link, args=(folder, chunk, step), name="weights to W&B", daemon=True)
        linking.start()  # online, W&B first asks its server, for long when that does not answer
        linking.join(_LINK_SECONDS)
        if linking.is_alive():
            logger.warning("W&B has not taken the link to %s in %.0f s; training goes on", folder, _LINK_SECONDS)

    def _link(self, folder: Path, chunk: str, step: int) -> None:
        try:
            artifact = self._wandb.Artifact(
                f"{self._run.id}-weights", "model", metadata={"chunk": chunk, STEP_KEY: step}
            )
            for path in sorted(path for path in folder.resolve().rglob("*") if path.is_file()):
                name = path.relative_to(folder.resolve()).as_posix()
                artifact.add_reference(path.as_uri(), name=name, checksum=False)
            self._run.log_artifact(artifact, aliases=[chunk.replace("/", "-"), f"step-{step}"])
        except Exception as error:  # whatever it is, training goes on
            logger.warning("no link to %s in W&B: %s: %s; training goes on", folder, type(error).__name__, error)

    def last_step(self) -> int | None:
        """Return the last step in the files of earlier offline launches; None online, and when they are gone."""
        return last_step(self._earlier) if self._is_offline else None

    def last_weights_step(self) -> int | None:
        """Return the same of the weights that were linked to."""
        return last_weights_step(self._earlier) if self._is_offline else None

    def flush(self) -> None:
        """Do nothing: W&B's own process writes when it has enough."""

    def close(self) -> None:
        self._run.finish()
