"""What rank 0 writes about a launch besides its states: ledger lines, metrics.jsonl, trackers, run.json.

The loop and the session say what happened; the form and the order on disk are decided here. Trackers are fed only
with steps that a durable state covers.
"""

import logging
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sharding.config import ConfigError
from training.batch_plan import BatchPlan
from training.config import RunConfig
from training.ledger import Ledger, has_state, parent_of
from training.loop import Position
from training.metrics_file import append_metrics, read_metrics, trim_metrics
from training.preview import read_pictures
from training.run_dir import RunDir, StartedChunk
from training.state_folder import LoadedState, load_state
from training.trackers import TensorBoard, Tracker, Trackers, WandB

logger = logging.getLogger(__name__)


class Records:
    """The records of one launch of one chunk. Make it early; `open` once the state to start from is loaded."""

    def __init__(self, config: RunConfig, run_dir: RunDir, ledger: Ledger, chunk_name: str) -> None:
        self.ledger = ledger
        self._config = config
        self._run_dir = run_dir
        self._chunk_name = chunk_name
        self._trace_path = run_dir.root / "trace.jsonl"
        self._trackers: Trackers | None = None
        self._unfed_rows: list[dict[str, Any]] = []
        self._covered_step = 0

    def open(
        self,
        chunk: StartedChunk,
        plans: Sequence[BatchPlan],
        *,
        number: int,
        position: Position,
        state: LoadedState | None,
        machine: Mapping[str, Any],
        frozen_weights: Mapping[str, str],
    ) -> None:
        """Trim metrics to the loaded state, write the `started` line, open the trackers.

        number: the chunk's place in the run. machine: what bit-equality depends on; its `devices` goes into the line.
        frozen_weights: digests of weights that no state holds, by config key.
        Raises ConfigError when a frozen weights file is not what the run was started with.
        """
        for path in (self._run_dir.metrics_path, self._trace_path):
            trim_metrics(path, after_step=position.global_step)
        self._require_same_frozen_weights(frozen_weights)
        run_json = self._describe_machine(machine)
        if state is not None and not has_state(self.ledger.lines, state.manifest.digest):
            # saved by a launch that was killed before it could say so
            self.state_saved(state.folder, state.manifest.digest)
        self.ledger.append(
            "started",
            chunk=chunk.name,
            position_in_run=number,
            parent=parent_of(self.ledger.lines, chunk.name),
            chunk_digest=chunk.info.digest,
            plan_digest=plans[0].digest,
            epochs=len(plans),
            steps=sum(len(plan.steps) for plan in plans),
            images_planned=sum(plan.num_images for plan in plans),
            images_left_out=[asdict(drop) for drop in plans[0].drops],
            global_step=position.global_step,
            resumed_from=self._run_dir.relative(state.folder) if state is not None else None,
            devices=machine["devices"],
        )
        self._trackers = Trackers(self._make_trackers(run_json["wandb_id"]), self._run_dir.root / "trackers.json")
        self._covered_step = position.global_step
        rows = read_metrics(self._run_dir.metrics_path)
        self._unfed_rows = [row for row in rows if row["global_step"] > self._trackers.fed]
        self.feed_trackers()

    def close(self) -> None:
        """Flush and close the trackers; what a durable state covers reaches them first."""
        if self._trackers is not None:
            self.feed_trackers()
            self._trackers.close()
            self._trackers = None

    # --- while training ---

    def step_done(self, metrics: Mapping[str, Any], trace: Mapping[str, Any]) -> None:
        """Append a step's row to metrics.jsonl, and to trace.jsonl when the run is traced."""
        append_metrics(self._run_dir.metrics_path, [metrics])
        self._unfed_rows.append(dict(metrics))
        if self._config.trackers.trace:
            append_metrics(self._trace_path, [trace])

    def skipped(self, position: Position, keys: Sequence[str], reason: str, not_finite_keys: Sequence[str]) -> None:
        """Record a step without an update."""
        suspects = f" ({', '.join(not_finite_keys)})" if not_finite_keys else ""
        logger.warning("%s step %d is passed over: %s%s", position.chunk, position.step, reason, suspects)
        fields = {"keys": list(keys), "reason": reason, "not_finite_keys": list(not_finite_keys)}
        self.ledger.append("skipped", **_step_fields(position), **fields)

    def broken(self, position: Position, images: Sequence[tuple[str, str]]) -> None:
        """Record (key, reason) of images that failed at run time."""
        for key, reason in images:
            logger.warning("%s: image %s is left out: %s", position.chunk, key, reason)
        keys, reasons = [key for key, _ in images], [reason for _, reason in images]
        self.ledger.append("broken", **_step_fields(position), keys=keys, reasons=reasons)

    def before_save(self) -> None:
        """Make the metrics of all steps so far durable: a state must not be ahead of them."""
        append_metrics(self._run_dir.metrics_path, [], durable=True)

    def state_saved(self, folder: Path, manifest_digest: str) -> None:
        """Record a durable state."""
        position = Position(**load_state(folder, is_verified=True).facts["position"])
        self.ledger.append("state_saved", **self._saved_fields(folder, manifest_digest, position))
        self._covered_step = position.global_step

    def stopped(self, position: Position, reason: str) -> None:
        """Record that the launch ends on request, with its state saved."""
        self.feed_trackers()
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
        self._run_dir.write_complete(chunk.name, **digests, **facts)
        self.ledger.append("chunk_done", **saved)
        self.feed_trackers()
        logger.info("chunk %s is done: %s images trained", chunk.name, f"{position.chunk_images_trained:,}")

    def feed_trackers(self) -> None:
        """Give the trackers what a durable state covers, rows and pictures; nothing when they have it all."""
        if self._trackers is None or not self._unfed_rows or self._unfed_rows[0]["global_step"] > self._covered_step:
            return
        pictures = read_pictures(self._run_dir.previews_folder(self._chunk_name))
        self._trackers.feed(self._unfed_rows, pictures, up_to_step=self._covered_step)
        self._unfed_rows = [row for row in self._unfed_rows if row["global_step"] > self._covered_step]

    # --- parts of the above ---

    def _make_trackers(self, wandb_id: str) -> list[Tracker]:
        settings, trackers = self._config.trackers, list[Tracker]()
        if settings.tensorboard:
            trackers.append(TensorBoard(self._run_dir.tensorboard_folder))
        if settings.wandb != "off":
            trackers.append(
                WandB(
                    self._run_dir.wandb_folder, project=settings.wandb_project, run_name=self._config.name,
                    run_id=wandb_id, mode=settings.wandb, config=self._config.model_dump(mode="json"),
                )
            )  # fmt: skip
        return trackers

    def _require_same_frozen_weights(self, now: Mapping[str, str]) -> None:
        """Raise ConfigError when a weights file that no state holds was changed: its path is free, its values not."""
        before = self._run_dir.read_run_json().get("frozen_weights", {})
        if changed := [key for key, digest in now.items() if before.get(key, digest) != digest]:
            raise ConfigError(
                f"{', '.join(changed)}: not what this run was started with (run.json, frozen_weights); "
                "give the same weights, or start a new run folder"
            )
        self._run_dir.update_run_json(frozen_weights={**before, **now})

    def _describe_machine(self, now: Mapping[str, Any]) -> dict[str, Any]:
        """Put into run.json what bit-equality depends on, and say aloud what changed since the last launch."""
        before = self._run_dir.read_run_json()
        if changes := [f"{key} {before[key]} -> {now[key]}" for key in now if before.get(key, now[key]) != now[key]]:
            logger.warning("since the last launch: %s; the same images, but not the same bits", ", ".join(changes))
        return self._run_dir.update_run_json(**now)

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


def machine_facts(*, num_processes: int, device: torch.device, num_threads: int, exact: bool) -> dict[str, Any]:
    """Return what a run's bits depend on besides its config."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"CPU {platform.processor() or platform.machine()}"
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "num_threads": num_threads,
        "exact": exact,
        "devices": f"{num_processes} x {name}",
    }


def _step_fields(position: Position) -> dict[str, Any]:
    return {
        "chunk": position.chunk,
        "epoch": position.epoch,
        "step": position.step,
        "global_step": position.global_step + 1,
    }
