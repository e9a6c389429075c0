"""Metrics of a run: metrics.jsonl is the truth, TensorBoard and W&B are fed from it.

A tracker gets a step only once a durable state covers it (`feed`), so that its series never goes back after a kill.
How far each tracker was fed stands in trackers.json, before and after each feed. After a kill in between, and always
where a tracker keeps things in memory, the next launch asks it what it has; from one that cannot say, the steps under
way are missing. None is there twice. W&B's links to exported weights are a series of their own, kept in the same way.
"""

import json
import math
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from sharding.files import write_json
from training.chart_layout import GROUPS
from training.config import RunConfig
from training.frozen_config import to_toml
from training.run_dir import RunDir
from training.wandb_tracker import STEP_KEY, WandB

LAYOUT_TAG = "custom_scalars__config__"
"""Where TensorBoard's plugin looks for its layout."""


class Tracker(Protocol):
    """A metrics sink with one strictly increasing series of steps over all launches of a run."""

    name: str
    is_kept: bool
    """Whether what was flushed outlives a kill."""

    def point(self, step: int, values: Mapping[str, float], pictures: Mapping[str, Image.Image]) -> None:
        """Record values and pictures at a step, all or none of them."""

    def last_step(self) -> int | None:
        """Return the last step that earlier launches recorded, -1 for none; None when the tracker cannot say."""

    def flush(self) -> None:
        """Hand everything to the operating system, where the tracker can."""

    def close(self) -> None:
        """Flush everything."""


class TensorBoard:
    """Event files in one folder; the x axis is the global step.

    config: the settings of this launch, shown as text at `step`, where it begins. A run's first event file holds the
    layout of the Custom Scalars tab, too.
    """

    name = "tensorboard"
    is_kept = True

    def __init__(self, folder: Path, *, config: RunConfig, step: int) -> None:
        from torch.utils.tensorboard import FileWriter, summary

        self._earlier = sorted(folder.glob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime)
        self._writer = FileWriter(str(folder))
        if not any(map(_has_layout, self._earlier)):
            groups = {
                group: {title: ["Multiline", patterns] for title, patterns in charts.items()}
                for group, charts in GROUPS.items()
            }
            self._writer.add_summary(summary.custom_scalars(groups))  # type: ignore[no-untyped-call]
        lines = to_toml(config.shown()).splitlines()
        text = "".join(f"    {line}\n" for line in lines)  # indented: code in Markdown
        self._writer.add_summary(summary.text("config", text), step)  # type: ignore[no-untyped-call]

    def point(self, step: int, values: Mapping[str, float], pictures: Mapping[str, Image.Image]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary
        from torch.utils.tensorboard import summary

        whole = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
        for name, picture in pictures.items():
            drawn = summary.image(name, np.asarray(picture), dataformats="HWC")  # type: ignore[no-untyped-call]
            whole.value.extend(drawn.value)
        self._writer.add_summary(whole, step)  # one record: a kill cannot cut it in two

    def last_step(self) -> int | None:
        """Return the last whole step in the newest event file of earlier launches."""
        from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

        last = -1
        for event in EventFileLoader(str(self._earlier[-1])).Load() if self._earlier else ():
            if any(value.tag.startswith("train/") for value in event.summary.value):
                last = max(last, event.step)
        return last

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _has_layout(path: Path) -> bool:
    """Tell whether an event file begins with a layout: the header, then it."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    first = islice(EventFileLoader(str(path)).Load(), 2)
    return any(value.tag == LAYOUT_TAG for event in first for value in event.summary.value)


class Trackers:
    """All trackers of a run, and how far each was fed."""

    def __init__(self, trackers: Iterable[Tracker], position_path: Path) -> None:
        self._trackers = list(trackers)
        self._path = position_path
        self._fed: dict[str, int] = {}
        self._positions = json.loads(position_path.read_text()) if position_path.exists() else {}
        for tracker in self._trackers:
            fed, asked = (self._positions.get(tracker.name, {}).get(key, -1) for key in ("fed", "asked"))
            if asked > fed or not tracker.is_kept:  # killed meanwhile, or perhaps
                last = tracker.last_step()
                fed = asked if last is None else min(max(last, fed) if tracker.is_kept else last, asked)
            self._fed[tracker.name] = fed
        self._asked = dict(self._fed)
        self._linked = {one.name: self._linked_before(one) for one in self._trackers if isinstance(one, WandB)}

    def _linked_before(self, wandb: WandB) -> int:
        linked: int = self._positions.get(wandb.name, {}).get("linked", -1)
        last = wandb.last_weights_step() if linked >= 0 else None
        return linked if last is None else min(last, linked)

    @property
    def fed(self) -> int:
        """The last step that every tracker has got; -1 before the first."""
        return min(self._fed.values(), default=-1)

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
            fed = self._fed[tracker.name]
            if last_step <= fed:
                continue
            self._asked[tracker.name] = last_step
            self._write_position()
            for step in sorted(step for step in by_step if step > fed):
                drawn = {name: Image.open(path) for name, path in pictures.get(step, {}).items()}
                tracker.point(step, chart_values(by_step[step]), drawn)
            tracker.flush()
            self._fed[tracker.name] = last_step
            self._write_position()

    def link_weights(self, exports: Mapping[int, tuple[str, Path]]) -> None:
        """Have W&B refer to the exported weights that it has no link to, in order of steps.

        exports: chunk and folder by the step at which they were made. Those of a step that W&B was not fed are left
        for later: a rewind that leaves W&B's series as it is leaves its links, too.
        """
        for wandb in self._trackers:
            if isinstance(wandb, WandB):
                before, fed = self._linked[wandb.name], self._fed[wandb.name]
                for step in sorted(step for step in exports if before < step <= fed):
                    self._linked[wandb.name] = step
                    self._write_position()
                    chunk, folder = exports[step]
                    wandb.link_weights(folder, chunk=chunk, step=step)

    def _write_position(self) -> None:
        for name, fed in self._fed.items():  # a tracker that is off keeps its place
            linked = {"linked": self._linked[name]} if name in self._linked else {}
            self._positions[name] = {"fed": fed, "asked": self._asked[name], **linked}
        write_json(self._path, self._positions)

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


def origin(run_json: Mapping[str, Any]) -> dict[str, Any]:
    """Return what links a run to others: the W&B runs that it was before it was rewound, the run it is a branch of."""
    return {key: run_json[key] for key in ("wandb_ids_before", "forked_from") if key in run_json}


def make_trackers(config: RunConfig, run_dir: RunDir, *, wandb_id: str, step: int) -> list[Tracker]:
    """Return the trackers that a config asks for. step: where this launch begins."""
    settings, trackers = config.trackers, list[Tracker]()
    if settings.tensorboard:
        trackers.append(TensorBoard(run_dir.tensorboard_folder, config=config, step=step))
    if settings.wandb != "off":
        trackers.append(
            WandB(
                run_dir.wandb_folder, project=settings.wandb_project, run_name=config.name, run_id=wandb_id,
                mode=settings.wandb, config={**config.shown(), **origin(run_dir.read_run_json())},
            )
        )  # fmt: skip
    return trackers
