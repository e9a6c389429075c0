"""A launch's working half: processes, networks, data and state of one chunk, and what the loop tells the outside.

Made after the lock is held and the run's config is frozen (`training.launch`). Every rank has a session; `ledger` is
None on all but rank 0.
"""

import logging
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from sharding.chunk import Chunk, ChunkError
from sharding.config import ConfigError
from training.batch_plan import BatchPlan
from training.chunk_data import Batch, ChunkData, ChunkSource, make_loader
from training.config import RunConfig
from training.engines.plain import PlainEngine
from training.exit_codes import DONE, STOPPED
from training.ledger import Ledger, LedgerError, chunk_records, has_state, parent_of
from training.lock import LockLostError
from training.loop import Position, train_epoch
from training.metrics_file import append_metrics, read_metrics, trim_metrics
from training.optimizer_state import load_optimizer_tensors, optimizer_tensors
from training.optimizers import make_optimizer
from training.plans import batch_plan, caption_settings, pixel_settings
from training.precision import DTYPES, choose_device, set_exact
from training.preview import read_pictures, write_pictures
from training.recipes.base import load_recipe
from training.run_dir import RunDir, StartedChunk
from training.state import StateSaver, check_room, state_bytes, take_snapshot
from training.state_folder import LoadedState, StateError, load_state, newest_verified, read_manifest, retain_states
from training.stop import StopRequest
from training.trackers import TensorBoard, Tracker, Trackers, WandB

logger = logging.getLogger(__name__)


class Session:
    """One chunk's training on one rank. `run` does it; the methods below it are the loop's `Recorder`."""

    def __init__(
        self,
        config: RunConfig,
        run_dir: RunDir,
        chunk: Chunk,
        number: int,
        *,
        ledger: Ledger | None,
        guard: Callable[[], None],
        num_processes: int | None,
    ) -> None:
        self._config = config
        self._run_dir = run_dir
        self._number = number
        self._ledger = ledger
        self._trackers: Trackers | None = None
        self._trace_path = run_dir.root / "trace.jsonl"
        self._unfed_rows: list[dict[str, Any]] = []
        self._covered_step = 0
        self.position = Position(chunk=chunk.name)
        """Where training stands; after an error, where it was last known to stand."""
        self._saver = StateSaver(
            asynchronous=config.save.asynchronous,
            check=guard,
            on_saved=self._state_saved,
            keep_last=config.save.keep_states,
        )

        # --- processes ---
        device = choose_device(config.device)
        self._exact = config.precision.exact if config.precision.exact is not None else device.type == "cpu"
        self._num_threads = set_exact(exact=self._exact, num_threads=config.precision.num_threads)
        accelerator = Accelerator(
            cpu=device.type == "cpu", mixed_precision="no" if config.precision.autocast == "no" else "bf16"
        )
        self._engine = PlainEngine(accelerator, exact=self._exact)
        _require_world_size(self._engine.world_size, num_processes)
        self._is_main = self._engine.rank == 0
        assert self._is_main == (ledger is not None)

        # --- the run's copy of the chunk, and where to start; rank 0 looks, all follow ---
        started = run_dir.start_chunk(chunk) if self._is_main else None
        self._engine.barrier()
        if started is None:
            started = run_dir.started_chunk(chunk.name, chunk_folder=chunk.folder)
        if started is None:
            raise ChunkError(f"chunk {chunk.name}: rank 0 copied it to {run_dir.root}, this rank cannot see it there")
        self._chunk: StartedChunk = started
        folder = self._engine.gather(self._find_state() if self._is_main else None)[0]
        self._state: LoadedState | None = load_state(Path(folder), is_verified=True) if folder is not None else None
        self.position = self._start_position()

    def close(self) -> None:
        """Finish the state that is being written and let go of trackers; after an error, too."""
        try:
            self._saver.drain()
            if self._trackers is not None:
                self._feed_trackers()
        except (StateError, LedgerError, LockLostError, OSError) as error:
            logger.error("the state under way was not saved: %s", error)
        finally:
            if self._trackers is not None:
                self._trackers.close()
                self._trackers = None

    # --- the launch, from top to bottom ---

    def run(self) -> int:
        """Train the chunk to its end, or until a stop is requested; return 0 or 75."""
        with StopRequest(self._run_dir.stop_requested) as self._stop:
            return self._run()

    def _run(self) -> int:
        config, engine = self._config, self._engine
        index = self._chunk.read_index()
        plans = [batch_plan(index, self._chunk.name, config=config, epoch=e) for e in range(config.data.epochs)]
        self._num_planned = sum(plan.num_images for plan in plans)
        self._plan_digests = [plan.digest for plan in plans]
        self._require_same_plan()
        if self.position.epoch < len(plans) and self.position.step == len(plans[self.position.epoch].steps):
            self.position = replace(self.position, epoch=self.position.epoch + 1, step=0)  # stopped at its end
        batches = self._batches(plans)
        loader = next(batches, None)  # its workers start while the networks load

        self._recipe = load_recipe(config)
        self._recipe.load(engine.device)
        self._names = {parameter: name for name, parameter in self._recipe.trainable().named_parameters()}
        model = engine.prepare(self._recipe.trainable(), self._make_optimizer())
        self._load_state()
        if self._is_main:
            self._open_outside(plans)

        while loader is not None:
            self.position, reason = train_epoch(
                plans[self.position.epoch], loader, position=self.position, config=config, recipe=self._recipe,
                engine=engine, model=model, optimizer=self._optimizer, recorder=self,
            )  # fmt: skip
            if reason:
                return self._finish_stopped(reason)
            self.position = replace(self.position, epoch=self.position.epoch + 1, step=0)
            loader = next(batches, None)
        self._finish_chunk()
        return DONE

    def _batches(self, plans: Sequence[BatchPlan]) -> Iterator[Iterator[Batch]]:
        """Yield one iterator of batches per epoch that is left, from the position on."""
        start = self.position
        first_global_step = start.global_step - start.step
        for plan in plans[start.epoch :]:
            first_step = start.step if plan.epoch == start.epoch else 0
            data = ChunkData(
                ChunkSource.of_chunk(self._chunk),
                plan,
                rank=self._engine.rank,
                world_size=self._engine.world_size,
                first_step=first_step,
                first_global_step=first_global_step,
                captions=caption_settings(self._config),
                pixels=pixel_settings(self._config),
            )
            first_global_step += len(plan.steps)
            if len(data):
                yield iter(make_loader(data, workers=self._config.data.workers, prefetch=self._config.data.prefetch))

    def _finish_stopped(self, reason: str) -> int:
        self._saver.drain()
        if self._is_main and self._ledger is not None:
            self._feed_trackers()
            position = self.position
            self._ledger.append("stopped", chunk=position.chunk, global_step=position.global_step, reason=reason)
            self._run_dir.clear_stop()
            logger.info(
                "stopped (%s) at global step %s with the state saved: run the same command again to go on",
                reason, f"{position.global_step:,}",
            )  # fmt: skip
        self._engine.barrier()
        return STOPPED

    def _finish_chunk(self) -> None:
        """Save the final state, make previews and weights, then say that the chunk is done: in this order."""
        name, config = self._chunk.name, self._config
        self._require_all_accounted_for()
        final = self._run_dir.final_folder(name)
        if self._state is None or self._state.folder != final:
            self._save(final)
        if config.preview.at_chunk_end:
            self.preview(self.position)  # while the state is written
        self._saver.drain()
        every = config.save.export_every_chunks
        if every and (self._number + 1) % every == 0:
            self._export()
        if self._is_main and self._ledger is not None:
            manifest_digest = load_state(final, is_verified=True).manifest.digest
            saved = self._saved_fields(final, manifest_digest, self.position)
            facts = {name: value for name, value in saved.items() if name != "chunk"}
            digests = {"chunk_digest": self._chunk.info.digest, "plan_digests": self._plan_digests}
            self._run_dir.write_complete(name, **digests, **facts)
            self._ledger.append("chunk_done", **saved)
            self._feed_trackers()
            self._retain()
            logger.info("chunk %s is done: %s images trained", name, f"{self.position.chunk_images_trained:,}")
        self._engine.barrier()

    def _require_all_accounted_for(self) -> None:
        """Raise StateError unless each planned image was trained, passed over or broken: a done chunk says so."""
        position = self.position
        counts = (position.chunk_images_trained, position.chunk_images_skipped, position.chunk_images_broken)
        if sum(counts) != self._num_planned:
            raise StateError(
                f"chunk {self._chunk.name}: {self._num_planned:,} images were planned, but {counts[0]:,} trained + "
                f"{counts[1]:,} skipped + {counts[2]:,} broken are {sum(counts):,}; the state does not fit the plan"
            )

    # --- starting ---

    def _find_state(self) -> str | None:
        """Return the folder of the state to start from: this chunk's newest, else its parent's final one."""
        assert self._ledger is not None
        own = self._run_dir.state_folders(self._chunk.name)
        if own:
            return str(self._newest(own))
        parent = parent_of(self._ledger.lines, self._chunk.name)
        record = chunk_records(self._ledger.lines).get(self._chunk.name)
        if record is not None and record.last_state is not None:
            raise StateError(
                f"chunk {self._chunk.name}: the ledger names {record.last_state.path}, but no state is there; "
                "restore it from a copy"
            )
        if parent is None:
            return None
        return str(self._newest(self._run_dir.state_folders(parent)))

    def _newest(self, folders: Sequence[Path]) -> Path:
        try:
            folder, _ = newest_verified(folders)
        except StateError as error:
            raise StateError(
                f"{error}; restore one of them from a copy, or start a new run folder with exported weights as "
                "stage_c.network"
            ) from error
        self._saver.trusted.add(read_manifest(folder).digest)
        return folder

    def _start_position(self) -> Position:
        """Return where to go on: inside this chunk, or at its start with the counters of its parent."""
        if self._state is None:
            return Position(chunk=self._chunk.name)
        position = Position(**self._state.facts["position"])
        if position.chunk == self._chunk.name:
            return position
        fresh = Position()
        return replace(
            position,
            chunk=self._chunk.name,
            epoch=0,
            step=0,
            **{name: getattr(fresh, name) for name in vars(fresh) if name.startswith("chunk_")},
        )

    def _require_same_plan(self) -> None:
        if self._state is None or self._state.facts["position"]["chunk"] != self._chunk.name:
            return
        if self._state.facts["plan_digests"] != self._plan_digests:
            raise StateError(
                f"chunk {self._chunk.name}: the batch plan is not the one that {self._state.folder} was trained with "
                "(index, batch, bucket or seed settings changed); put them back to finish this chunk"
            )

    def _make_optimizer(self) -> torch.optim.Optimizer:
        settings = self._config.optimizer
        self._optimizer = make_optimizer(
            settings.name,
            self._recipe.parts(),
            learning_rates=self._recipe.learning_rates(),
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
        )
        return self._optimizer

    def _load_state(self) -> None:
        if self._state is None:
            logger.info("chunk %s: starting from the weights that the config names", self._chunk.name)
            return
        self._engine.load_model_state(self._state.component("model"))
        facts = self._state.facts["optimizer"]
        load_optimizer_tensors(self._optimizer, self._state.component("optimizer"), facts, self._names)
        if "recipe" in self._state.components:
            self._recipe.load_state_tensors(self._state.component("recipe"))
        logger.info(
            "resuming at chunk %s, epoch %d, step %d (global step %s) from %s",
            self.position.chunk, self.position.epoch, self.position.step,
            f"{self.position.global_step:,}", self._state.folder,
        )  # fmt: skip

    def _open_outside(self, plans: Sequence[BatchPlan]) -> None:
        """Rank 0: ledger line, run.json, metrics trimmed to the state, trackers, disk forecast."""
        assert self._ledger is not None
        config, position, run_dir = self._config, self.position, self._run_dir
        for path in (run_dir.metrics_path, self._trace_path):
            trim_metrics(path, after_step=position.global_step)
        self._devices = f"{self._engine.world_size} x {_device_name(self._engine.device)}"
        self._require_same_frozen_weights()
        facts = self._describe_machine()
        if self._state is not None and not has_state(self._ledger.lines, self._state.manifest.digest):
            # saved by a launch that was killed before it could say so
            self._state_saved(self._state.folder, self._state.manifest.digest)
        self._ledger.append(
            "started",
            chunk=self._chunk.name,
            position_in_run=self._number,
            parent=parent_of(self._ledger.lines, self._chunk.name),
            chunk_digest=self._chunk.info.digest,
            plan_digest=plans[0].digest,
            epochs=len(plans),
            steps=sum(len(plan.steps) for plan in plans),
            images_planned=sum(plan.num_images for plan in plans),
            images_left_out=[asdict(drop) for drop in plans[0].drops],
            global_step=position.global_step,
            resumed_from=run_dir.relative(self._state.folder) if self._state is not None else None,
            devices=self._devices,
        )
        logger.info(
            check_room(
                run_dir.root, state_bytes(self._state_tensors()), keep_last=config.save.keep_states,
                num_present=len(run_dir.state_folders(self._chunk.name)),
            )
        )  # fmt: skip
        trackers: list[Tracker] = []
        if config.trackers.tensorboard:
            trackers.append(TensorBoard(run_dir.tensorboard_folder))
        if config.trackers.wandb != "off":
            trackers.append(
                WandB(
                    run_dir.wandb_folder, project=config.trackers.wandb_project, run_name=config.name,
                    run_id=facts["wandb_id"], mode=config.trackers.wandb, config=config.model_dump(mode="json"),
                )
            )  # fmt: skip
        self._trackers = Trackers(trackers, run_dir.root / "trackers.json")
        self._covered_step = position.global_step
        self._unfed_rows = [
            row for row in read_metrics(run_dir.metrics_path) if row["global_step"] > self._trackers.fed
        ]
        self._feed_trackers()

    def _require_same_frozen_weights(self) -> None:
        """Raise ConfigError when a weights file that no state holds was changed: its path is free, its values not."""
        now = self._recipe.frozen_digests()
        before = self._run_dir.read_run_json().get("frozen_weights", {})
        if changed := [key for key, digest in now.items() if before.get(key, digest) != digest]:
            raise ConfigError(
                f"{', '.join(changed)}: not what this run was started with (run.json, frozen_weights); "
                "give the same weights, or start a new run folder"
            )
        self._run_dir.update_run_json(frozen_weights={**before, **now})

    def _describe_machine(self) -> dict[str, Any]:
        """Put into run.json what bit-equality depends on, and say aloud what changed since the last launch."""
        now: dict[str, Any] = {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "num_threads": self._num_threads,
            "exact": self._exact,
            "devices": self._devices,
        }
        before = self._run_dir.read_run_json()
        if changes := [f"{key} {before[key]} -> {now[key]}" for key in now if before.get(key, now[key]) != now[key]]:
            logger.warning("since the last launch: %s; the same images, but not the same bits", ", ".join(changes))
        return self._run_dir.update_run_json(**now)

    # --- states ---

    def _state_tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        optimizer, _ = optimizer_tensors(self._optimizer, self._names)
        tensors = {"model": self._engine.model_state(), "optimizer": optimizer, "recipe": self._recipe.state_tensors()}
        return {name: part for name, part in tensors.items() if part or name != "recipe"}

    def _save(self, folder: Path) -> None:
        """Begin to save a state in `folder`; every rank has the same, rank 0 writes it."""
        if not self._is_main:
            return
        append_metrics(self._run_dir.metrics_path, [], durable=True)
        _, optimizer_facts = optimizer_tensors(self._optimizer, self._names)
        facts = {
            "global_step": self.position.global_step,
            "position": asdict(self.position),
            "plan_digests": self._plan_digests,
            "chunk_digest": self._chunk.info.digest,
            "optimizer": optimizer_facts,
        }
        self._saver.save(folder, take_snapshot(self._state_tensors(), facts))

    def _state_saved(self, folder: Path, manifest_digest: str) -> None:
        assert self._ledger is not None
        position = Position(**load_state(folder, is_verified=True).facts["position"])
        self._ledger.append("state_saved", **self._saved_fields(folder, manifest_digest, position))
        self._covered_step = position.global_step

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

    def _retain(self) -> None:
        """A done chunk's final state stands for its others, also where a kill came first; keep the newest of these."""
        assert self._ledger is not None
        trusted, finals = self._saver.trusted, []
        for name, record in chunk_records(self._ledger.lines).items():
            if record.status == "done":
                folders = self._run_dir.state_folders(name)
                retain_states(folders, keep_last=1, trusted=trusted)
                finals += [folder for folder in folders if folder.name == "final"]
        retain_states(finals, keep_last=self._config.save.keep_chunks, trusted=trusted)

    def _export(self) -> None:
        folder = self._run_dir.weights_folder(self._chunk.name)
        if self._is_main:
            metadata = {
                "chunkline.run": self._run_dir.read_run_json()["run_id"],
                "chunkline.chunk": self._chunk.name,
                "chunkline.global_step": str(self.position.global_step),
                "chunkline.images_seen": str(self.position.images_seen),
            }
            dtype = DTYPES[self._config.save.export_dtype]
            for file in self._recipe.export(folder, dtype=dtype, metadata=metadata):
                logger.info("weights %s", file)
        self._engine.barrier()

    def _feed_trackers(self) -> None:
        """Give the trackers what a durable state covers, rows and pictures."""
        assert self._trackers is not None
        pictures = read_pictures(self._run_dir.previews_folder(self._chunk.name))
        self._trackers.feed(self._unfed_rows, pictures, up_to_step=self._covered_step)
        self._unfed_rows = [row for row in self._unfed_rows if row["global_step"] > self._covered_step]

    # --- what the loop tells (training.loop.Recorder) ---

    def step_done(self, position: Position, metrics: Mapping[str, Any], trace: Mapping[str, Any]) -> None:
        self.position = position
        if not self._is_main:
            return
        append_metrics(self._run_dir.metrics_path, [metrics])
        self._unfed_rows.append(dict(metrics))
        if self._config.trackers.trace:
            append_metrics(self._trace_path, [trace])

    def skipped(self, position: Position, keys: Sequence[str], reason: str, not_finite_keys: Sequence[str]) -> None:
        suspects = f" ({', '.join(not_finite_keys)})" if not_finite_keys else ""
        logger.warning("%s step %d is passed over: %s%s", position.chunk, position.step, reason, suspects)
        if self._ledger is not None:
            self._ledger.append(
                "skipped", **_step_fields(position), keys=list(keys), reason=reason,
                not_finite_keys=list(not_finite_keys),
            )  # fmt: skip

    def broken(self, position: Position, images: Sequence[tuple[str, str]]) -> None:
        for key, reason in images:
            logger.warning("%s: image %s is left out: %s", position.chunk, key, reason)
        if self._ledger is not None:
            keys, reasons = [key for key, _ in images], [reason for _, reason in images]
            self._ledger.append("broken", **_step_fields(position), keys=keys, reasons=reasons)

    def save(self, position: Position) -> None:
        self._save(self._run_dir.state_folder(position.chunk, position.global_step))

    def poll(self) -> None:
        if self._is_main:
            self._saver.poll()
            if self._unfed_rows and self._unfed_rows[0]["global_step"] <= self._covered_step:
                self._feed_trackers()

    def preview(self, position: Position) -> None:
        """Make previews on every rank, in eval mode and the run's compute format; rank 0 writes them."""
        if self._config.preview.prompts:
            with self._engine.autocast():
                pictures = self._recipe.preview(self._config.preview.prompts)
            if self._is_main:
                write_pictures(self._run_dir.previews_folder(position.chunk), position.global_step, pictures)
        self._engine.barrier()

    def stop_reason(self) -> str:
        return self._stop.poll() if self._is_main else self._stop.poll_signals()


def _step_fields(position: Position) -> dict[str, Any]:
    return {
        "chunk": position.chunk,
        "epoch": position.epoch,
        "step": position.step,
        "global_step": position.global_step + 1,
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {platform.processor() or platform.machine()}"


def _require_world_size(world_size: int, wanted: int | None) -> None:
    """Raise ConfigError when there are not as many processes as asked for, or each believes itself alone."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size != launched:
        raise ConfigError(
            f"the launcher started {launched} processes, but each believes it is one of {world_size}; on CPUs set "
            "ACCELERATE_USE_CPU=true and do not use `accelerate launch --cpu`"
        )
    if wanted is not None and world_size != wanted:
        raise ConfigError(
            f"--processes {wanted}: the launcher started {world_size}; `accelerate launch --cpu --num_processes "
            f"{wanted}` starts one, use ACCELERATE_USE_CPU=true with configs/accelerate/ddp.yaml"
        )
