"""What rank 0 writes about a launch besides its states: ledger lines, metrics.jsonl, trackers, run.json.

The loop and the session say what happened; the form and the order on disk are decided here.
"""

import logging
import os
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from training.alerts import Alerts
from training.batch_plan import BatchPlan
from training.campaign import next_chunk, read_campaign
from training.chunk_records import chunk_records, has_state, parent_of
from training.config import RunConfig
from training.errors import TroubleError
from training.gauges import Gauges, progress_of
from training.ledger import Ledger
from training.loss_window import WINDOW
from training.machine import command_line, record_machine, require_same_frozen_weights
from training.metrics_file import append_metrics, read_metrics, trim_metrics
from training.position import Position
from training.preview import remove_pictures
from training.run_dir import RunDir
from training.spikes import Spike
from training.stages import epochs_of
from training.started_chunk import StartedChunk
from training.state_folder import load_state
from training.state_manifest import read_manifest
from training.status_tables import count_images
from training.step_report import StepReport
from training.tracker_feed import TrackerFeed

logger = logging.getLogger(__name__)

_PROBLEMS = {"not_finite": "a loss or gradient is not finite", "no_image": "none of its images could be read"}


class Records:
    """The records of one launch. `start_chunk` once the state to start from is known. alerts: by default none."""

    def __init__(self, config: RunConfig, run_dir: RunDir, ledger: Ledger, alerts: Alerts | None = None) -> None:
        self.ledger = ledger
        self._alerts = alerts or Alerts(config.trackers, run=config.name, is_main=False)
        self._config = config
        self._run_dir = run_dir
        self._trace_path = run_dir.trace_path
        self._feed: TrackerFeed | None = None
        self._gauges = Gauges()
        self._validated_step = -1

    # --- a chunk begins, a launch ends ---

    def start_chunk(
        self,
        chunk: StartedChunk,
        plans: Sequence[BatchPlan],
        *,
        number: int,
        position: Position,
        resumed_from: Path | None,
        machine: Mapping[str, Any],
        frozen_weights: Callable[[], Mapping[str, str]],
    ) -> None:
        """Trim metrics to the state that training starts from, write the `started` line, open the trackers.

        number: the chunk's place in the run. resumed_from: folder of that state. machine: what bit-equality depends on;
        its `devices` goes into the line. frozen_weights: gives digests of weights that no state holds, by config key;
        asked once a launch. Raises ConfigError when a frozen weights file is not what the run was started with.
        """
        if self._feed is None:
            self._forget_after(position)
            require_same_frozen_weights(self._run_dir, frozen_weights())
            num_processes = int(os.environ.get("WORLD_SIZE", "1"))
            if command := command_line(sys.argv[1:], num_processes=num_processes):
                self._run_dir.update_run_json(command=command)
            wandb_id = record_machine(self._run_dir, machine)["wandb_id"]
        if resumed_from is not None:
            manifest_digest = read_manifest(resumed_from).digest
            if not has_state(self.ledger.lines, manifest_digest):
                self.state_saved(resumed_from, manifest_digest)  # by a launch that was killed before it could say so
        self.ledger.append(
            "started",
            chunk=chunk.name,
            position_in_run=number,
            parent=parent_of(self.ledger.lines, chunk.name),
            chunk_digest=chunk.info.digest,
            plan_digest=plans[0].digest,
            plan_digests=[plan.digest for plan in plans],
            epochs=len(plans),
            steps=sum(len(plan.steps) for plan in plans),
            images_planned=sum(plan.num_images for plan in plans),
            images_left_out=[asdict(drop) for drop in plans[0].drops],
            global_step=position.global_step,
            resumed_from=self._run_dir.relative(resumed_from) if resumed_from is not None else None,
            devices=machine["devices"],
        )
        if self._feed is None:
            self._feed = TrackerFeed(self._config, self._run_dir, wandb_id=wandb_id, step=position.global_step)
            for name, send in self._feed.alert_senders.items():
                self._alerts.also_to(name, send)
        self._feed.covered_step = position.global_step
        campaign = read_campaign(self._config.data.workspace, self._config.data.chunks, self._run_dir)
        planned = sum(plan.num_images for plan in plans)
        self._gauges.progress = progress_of(
            campaign, chunk.name, num_samples=chunk.info.num_samples, images_planned=planned
        )
        self._feed.feed()

    def _forget_after(self, position: Position) -> None:
        """Drop what was measured and drawn of steps that the state at `position` does not hold."""
        for path in (self._run_dir.metrics_path, self._trace_path):
            trim_metrics(path, after_step=position.global_step)
        remove_pictures(self._run_dir.previews_folder(position.chunk), after_step=position.global_step)
        self._validated_step, last = -1, deque[dict[str, Any]](maxlen=WINDOW)
        for row in read_metrics(self._run_dir.metrics_path):
            if "validation/loss" in row:
                self._validated_step = row["global_step"]
            elif "step" in row:
                last.append(row)
        self._gauges.go_on_after(last)

    def close(self) -> None:
        """Flush and close the trackers; what a durable state covers reaches them first."""
        if self._feed is not None:
            for name in self._feed.alert_senders:
                self._alerts.let_go(name)
            self._feed.close()
            self._feed = None

    # --- while training ---

    def step_done(self, report: StepReport, spike: Spike | None = None) -> None:
        """Append a step's row to metrics.jsonl, to trace.jsonl when traced, and what went wrong to the ledger."""
        if report.broken:
            self._broken(report)
        if report.problem:
            self._skipped(report)
        if spike is not None and spike.is_first:
            logger.warning("%s step %d: %s", report.after.chunk, report.after.step, spike)
        metrics = report.metrics()
        metrics |= self._gauges.read(report, metrics, is_spike=spike is not None)
        self._append_row(metrics)
        if self._config.trackers.trace:
            append_metrics(self._trace_path, [report.trace()])
        self._alerts.step_done(report, spike)

    def _append_row(self, row: Mapping[str, Any]) -> None:
        append_metrics(self._run_dir.metrics_path, [row])
        if self._feed is not None:
            self._feed.add(row)

    def last_weighted_losses(self) -> list[float]:
        """Return those of the last 100 steps, which the next one's is judged by."""
        return self._gauges.weighted_losses

    def _skipped(self, report: StepReport) -> None:
        place, suspects = _step_fields(report.before), report.not_finite_keys
        logger.warning(
            "%s step %d is passed over: %s%s",
            report.after.chunk, report.after.step, _PROBLEMS.get(report.problem, "the run went back because of it"),
            f" ({', '.join(suspects)})" if suspects else "",
        )  # fmt: skip
        self.ledger.append("skipped", **place, keys=report.keys, reason=report.problem, not_finite_keys=suspects)

    def _broken(self, report: StepReport) -> None:
        for key, reason in report.broken:
            logger.warning("%s: image %s is left out: %s", report.before.chunk, key, reason)
        keys, reasons = [key for key, _ in report.broken], [reason for _, reason in report.broken]
        self.ledger.append("broken", **_step_fields(report.before), keys=keys, reasons=reasons)

    def rolled_back(self, failed_at: Position, position: Position, *, folder: Path, trouble: TroubleError) -> None:
        """Record that training goes back to the state in `folder`, and forget what is undone.

        The steps of the trouble, and the update before them, are passed over from here on.
        """
        pass_over = range(trouble.steps.start - 1, trouble.steps.stop)
        self.ledger.append(
            "rolled_back", chunk=failed_at.chunk, from_global_step=failed_at.global_step,
            global_step=position.global_step, path=self._run_dir.relative(folder), pass_over=list(pass_over),
            reason=trouble.reason,
        )  # fmt: skip
        self._forget_after(position)
        if self._feed is not None:
            self._feed.read_back()
        logger.warning(
            "%s: back from global step %s to %s; steps %s to %s are not tried again",
            failed_at.chunk, f"{failed_at.global_step:,}", folder, f"{pass_over[0]:,}", f"{pass_over[-1]:,}",
        )  # fmt: skip

    def is_validated(self, position: Position) -> bool:
        """Tell whether the losses of held-out pictures at this step are in metrics.jsonl."""
        return self._validated_step == position.global_step

    def validated(self, position: Position, values: Mapping[str, Any]) -> None:
        """Append the losses of held-out pictures to metrics.jsonl, as a row of their own."""
        self.measured(position, values)
        self._validated_step = position.global_step

    def measured(self, position: Position, values: Mapping[str, Any]) -> None:
        """Append what was measured beside the steps to metrics.jsonl, as a row of its own."""
        self._append_row({"global_step": position.global_step, "chunk": position.chunk, **values})

    def before_save(self) -> None:
        """Make the metrics of all steps so far durable: a state must not be ahead of them."""
        append_metrics(self._run_dir.metrics_path, [], durable=True)

    def state_saved(self, folder: Path, manifest_digest: str) -> None:
        """Record a durable state."""
        position = Position(**load_state(folder, is_verified=True).facts["position"])
        self.ledger.append("state_saved", **self._saved_fields(folder, manifest_digest, position))
        if self._feed is not None:
            self._feed.covered_step = position.global_step
        state_bytes = sum(file.num_bytes for file in read_manifest(folder).files.values())
        self._alerts.state_saved(self._run_dir.root, position, state_bytes=state_bytes)

    def stopped(self, position: Position, reason: str, *, is_complete: bool) -> None:
        """Record that the launch ends on request, with its state saved. is_complete: see `TrackerFeed.feed`."""
        self.feed_trackers(is_complete=is_complete)
        self.ledger.append("stopped", chunk=position.chunk, global_step=position.global_step, reason=reason)
        self._run_dir.clear_stop()
        logger.info(
            "stopped (%s) at global step %s with the state saved: run the same command again to go on",
            reason, f"{position.global_step:,}",
        )  # fmt: skip

    def chunk_done(self, chunk: StartedChunk, position: Position, *, final: Path, plan_digests: Sequence[str]) -> None:
        """Write complete.json, then the `chunk_done` line: the chunk is trained."""
        manifest_digest = load_state(final, is_verified=True).manifest.digest
        saved = self._saved_fields(final, manifest_digest, position)
        facts = {name: value for name, value in saved.items() if name != "chunk"}
        digests = {"chunk_digest": chunk.info.digest, "plan_digests": list(plan_digests)}
        self._run_dir.write_complete(chunk.name, counts=asdict(count_images(chunk)), **digests, **facts)
        self.ledger.append("chunk_done", **saved)
        self.feed_trackers(is_complete=True)
        logger.info("chunk %s is done: %s images trained", chunk.name, f"{position.chunk_images_trained:,}")
        names = self._run_dir.read_run_json().get("chunks", [chunk.name])
        if next_chunk(names, chunk_records(self.ledger.lines), epochs=epochs_of(self._config)) is None:
            self._alerts.campaign_done(position, num_chunks=len(names))

    def feed_trackers(self, *, is_complete: bool = False) -> None:
        """Give the trackers what a durable state covers. is_complete: see `TrackerFeed.feed`."""
        if self._feed is not None:
            self._feed.feed(is_complete=is_complete)

    def _saved_fields(self, folder: Path, manifest_digest: str, position: Position) -> dict[str, Any]:
        return {
            "chunk": position.chunk,
            "path": self._run_dir.relative(folder),
            "manifest_digest": manifest_digest,
            "epoch": position.epoch,
            "step": position.step,
            "global_step": position.global_step,
            "images_trained": position.chunk_images_trained,
            "applied_updates": position.chunk_applied_updates,
            "busy_seconds": position.chunk_busy_seconds,
        }


def _step_fields(position: Position) -> dict[str, Any]:
    return {
        "chunk": position.chunk,
        "epoch": position.epoch,
        "step": position.step,
        "global_step": position.global_step + 1,
    }
