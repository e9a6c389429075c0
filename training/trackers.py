"""Metrics of a run: metrics.jsonl is the truth, TensorBoard and W&B are fed from it.

A tracker gets a step only once a durable state covers it (`feed`), so that its series never goes back after a kill.
How far each tracker was fed stands in trackers.json, written before the feed: a kill in between loses points of a
chart, never doubles them.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image

from sharding.files import write_json
from training.config import RunConfig
from training.frozen_config import to_toml
from training.run_dir import RunDir

STEP_KEY = "global_step"
IMAGES_SEEN_KEY = "train/images_seen"


class Tracker(Protocol):
    """A metrics sink with one strictly increasing series of steps over all launches of a run."""

    name: str

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Record values at a step."""

    def images(self, step: int, pictures: Mapping[str, Image.Image]) -> None:
        """Record pictures at a step."""

    def flush(self) -> None:
        """Hand everything to the operating system: a kill after this loses nothing."""

    def close(self) -> None:
        """Flush everything."""


class TensorBoard:
    """Event files in one folder; the x axis is the global step.

    config: the settings of this launch, shown as text at `step`, where it begins.
    """

    name = "tensorboard"

    def __init__(self, folder: Path, *, config: RunConfig, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(log_dir=str(folder))
        lines = to_toml(config.model_dump(mode="json")).splitlines()
        self._writer.add_text("config", "".join(f"    {line}\n" for line in lines), step)  # indented: code in Markdown

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def images(self, step: int, pictures: Mapping[str, Image.Image]) -> None:
        for name, picture in pictures.items():
            self._writer.add_image(name, np.asarray(picture), step, dataformats="HWC")

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandB:
    """One W&B run over all launches, by its id. Offline mode writes files to sync later."""

    name = "wandb"

    def __init__(
        self, folder: Path, *, project: str, run_name: str, run_id: str, mode: Literal["online", "offline"], config: Any
    ) -> None:
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        self._wandb = wandb
        self._run = wandb.init(
            project=project, name=run_name, id=run_id, dir=str(folder), mode=mode, resume="allow", config=config,
            allow_val_change=True,
        )  # fmt: skip
        self._run.define_metric(STEP_KEY)
        self._run.define_metric(IMAGES_SEEN_KEY)  # may be chosen as the x axis
        self._run.define_metric("*", step_metric=STEP_KEY)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, STEP_KEY: step}, step=step)

    def images(self, step: int, pictures: Mapping[str, Image.Image]) -> None:
        self._run.log({name: self._wandb.Image(picture) for name, picture in pictures.items()}, step=step)

    def flush(self) -> None:
        """Do nothing: W&B's own process writes as it goes."""

    def close(self) -> None:
        self._run.finish()


class Trackers:
    """All trackers of a run, and how far each was fed."""

    def __init__(self, trackers: Iterable[Tracker], position_path: Path) -> None:
        self._trackers = list(trackers)
        self._path = position_path
        self._fed: dict[str, int] = json.loads(position_path.read_text()) if position_path.exists() else {}

    @property
    def fed(self) -> int:
        """The last step that every tracker has got; -1 before the first."""
        return min((self._fed.get(tracker.name, -1) for tracker in self._trackers), default=-1)

    def feed(
        self,
        rows: Iterable[Mapping[str, Any]],
        pictures: Mapping[int, Mapping[str, Path]],
        *,
        up_to_step: int,
    ) -> None:
        """Send what lies beyond the step fed before, up to and including `up_to_step`, in order of steps.

        rows: of metrics.jsonl; values that are not finite numbers are left out, rows of one step become one. pictures:
        PNG files by step and name.
        """
        by_step: dict[int, dict[str, Any]] = {}
        for row in rows:
            if row[STEP_KEY] <= up_to_step:
                by_step.setdefault(row[STEP_KEY], {}).update(row)
        if not by_step:
            return
        last_step = max(by_step)
        for tracker in self._trackers:
            fed = self._fed.get(tracker.name, -1)
            if last_step <= fed:
                continue
            self._fed[tracker.name] = last_step
            write_json(self._path, self._fed)
            for step in sorted(step for step in by_step if step > fed):
                tracker.scalars(step, chart_values(by_step[step]))
                if step in pictures:
                    tracker.images(step, {name: Image.open(path) for name, path in pictures[step].items()})
            tracker.flush()

    def close(self) -> None:
        """Flush and close every tracker."""
        for tracker in self._trackers:
            tracker.close()


def chart_values(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the finite numbers of a metrics row under their `group/name` keys."""
    return {
        name: float(value)
        for name, value in row.items()
        if "/" in name and isinstance(value, int | float) and math.isfinite(value)
    }


def make_trackers(config: RunConfig, run_dir: RunDir, *, wandb_id: str, step: int) -> list[Tracker]:
    """Return the trackers that a config asks for. step: where this launch begins."""
    settings, trackers = config.trackers, list[Tracker]()
    if settings.tensorboard:
        trackers.append(TensorBoard(run_dir.tensorboard_folder, config=config, step=step))
    if settings.wandb != "off":
        trackers.append(
            WandB(
                run_dir.wandb_folder, project=settings.wandb_project, run_name=config.name, run_id=wandb_id,
                mode=settings.wandb, config=config.model_dump(mode="json"),
            )
        )  # fmt: skip
    return trackers
