"""A launch's working half: processes, networks, data and states of one chunk.

Made after the lock is held and the run's config is frozen (`training.launch`). Every rank has a session; `records` and
what is written are rank 0's.
"""

import logging
import os
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
from training.ledger import Ledger, LedgerError, chunk_records, parent_of
from training.lock import LockLostError
from training.loop import Position, train_epoch
from training.optimizer_state import load_optimizer_tensors, optimizer_tensors
from training.optimizers import make_optimizer
from training.plans import batch_plan, caption_settings, pixel_settings
from training.precision import DTYPES, choose_device, set_exact
from training.preview import write_pictures
from training.recipes.base import load_recipe
from training.records import Records, machine_facts
from training.run_dir import RunDir, StartedChunk
from training.state import StateSaver, check_room, state_bytes, take_snapshot
from training.state_folder import LoadedState, StateError, load_state, newest_verified, read_manifest, retain_states
from training.stop import StopRequest

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
        self._records = Records(config, run_dir, ledger, chunk.name) if ledger is not None else None
        self.position = Position(chunk=chunk.name)
        """Where training stands; after an error, where it was last known to stand."""
        self._saver = StateSaver(
            asynchronous=config.save.asynchronous,
            check=guard,
            on_saved=self._records.state_saved if self._records is not None else None,
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
        assert (self._engine.rank == 0) == (ledger is not None)

        # --- the run's copy of the chunk, and where to start; rank 0 looks, all follow ---
        started = run_dir.start_chunk(chunk) if ledger is not None else None
        self._engine.barrier()
        if started is None:
            started = run_dir.started_chunk(chunk.name, chunk_folder=chunk.folder)
        if started is None:
            raise ChunkError(f"chunk {chunk.name}: rank 0 copied it to {run_dir.root}, this rank cannot see it there")
        self._chunk: StartedChunk = started
        folder = self._engine.gather(self._find_state(ledger) if ledger is not None else None)[0]
        self._state: LoadedState | None = load_state(Path(folder), is_verified=True) if folder is not None else None
        self.position = self._start_position()

    def close(self) -> None:
        """Finish the state that is being written and let go of trackers; after an error, too."""
        try:
            self._saver.drain()
        except (StateError, LedgerError, LockLostError, OSError) as error:
            logger.error("the state under way was not saved: %s", error)
        finally:
            if self._records is not None:
                self._records.close()

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
        if self._records is not None:
            self._open_records(self._records, plans)

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
        if self._records is not None:
            self._records.stopped(self.position, reason)
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
        if self._records is not None:
            self._records.chunk_done(self._chunk, self.position, final=final, plan_digests=self._plan_digests)
            self._retain(self._records.ledger)
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

    def _find_state(self, ledger: Ledger) -> str | None:
        """Return the folder of the state to start from: this chunk's newest, else its parent's final one."""
        own = self._run_dir.state_folders(self._chunk.name)
        if own:
            return str(self._newest(own))
        parent = parent_of(ledger.lines, self._chunk.name)
        record = chunk_records(ledger.lines).get(self._chunk.name)
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

    def _open_records(self, records: Records, plans: Sequence[BatchPlan]) -> None:
        machine = machine_facts(
            num_processes=self._engine.world_size,
            device=self._engine.device,
            num_threads=self._num_threads,
            exact=self._exact,
        )
        records.open(
            self._chunk, plans, number=self._number, position=self.position, state=self._state, machine=machine,
            frozen_weights=self._recipe.frozen_digests(),
        )  # fmt: skip
        num_present = len(self._run_dir.state_folders(self._chunk.name))
        num_bytes = state_bytes(self._state_tensors())
        keep_last = self._config.save.keep_states
        logger.info(check_room(self._run_dir.root, num_bytes, keep_last=keep_last, num_present=num_present))

    # --- states ---

    def _state_tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        optimizer, _ = optimizer_tensors(self._optimizer, self._names)
        tensors = {"model": self._engine.model_state(), "optimizer": optimizer, "recipe": self._recipe.state_tensors()}
        return {name: part for name, part in tensors.items() if part or name != "recipe"}

    def _save(self, folder: Path) -> None:
        """Begin to save a state in `folder`; every rank has the same, rank 0 writes it."""
        if self._records is None:
            return
        self._records.before_save()
        _, optimizer_facts = optimizer_tensors(self._optimizer, self._names)
        facts = {
            "global_step": self.position.global_step,
            "position": asdict(self.position),
            "plan_digests": self._plan_digests,
            "chunk_digest": self._chunk.info.digest,
            "optimizer": optimizer_facts,
        }
        self._saver.save(folder, take_snapshot(self._state_tensors(), facts))

    def _retain(self, ledger: Ledger) -> None:
        """A done chunk's final state stands for its others, also where a kill came first; keep the newest of these."""
        trusted, finals = self._saver.trusted, []
        for name, record in chunk_records(ledger.lines).items():
            if record.status == "done":
                folders = self._run_dir.state_folders(name)
                retain_states(folders, keep_last=1, trusted=trusted)
                finals += [folder for folder in folders if folder.name == "final"]
        retain_states(finals, keep_last=self._config.save.keep_chunks, trusted=trusted)

    def _export(self) -> None:
        folder = self._run_dir.weights_folder(self._chunk.name)
        if self._records is not None:
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

    # --- what the loop tells (training.loop.Recorder) ---

    def step_done(self, position: Position, metrics: Mapping[str, Any], trace: Mapping[str, Any]) -> None:
        self.position = position
        if self._records is not None:
            self._records.step_done(metrics, trace)

    def skipped(self, position: Position, keys: Sequence[str], reason: str, not_finite_keys: Sequence[str]) -> None:
        if self._records is not None:
            self._records.skipped(position, keys, reason, not_finite_keys)

    def broken(self, position: Position, images: Sequence[tuple[str, str]]) -> None:
        if self._records is not None:
            self._records.broken(position, images)

    def save(self, position: Position) -> None:
        self._save(self._run_dir.state_folder(position.chunk, position.global_step))

    def poll(self) -> None:
        if self._records is not None:
            self._saver.poll()
            self._records.feed_trackers()

    def preview(self, position: Position) -> None:
        """Make previews on every rank, in eval mode and the run's compute format; rank 0 writes them."""
        if self._config.preview.prompts:
            with self._engine.autocast():
                pictures = self._recipe.preview(self._config.preview.prompts)
            if self._records is not None:
                write_pictures(self._run_dir.previews_folder(position.chunk), position.global_step, pictures)
        self._engine.barrier()

    def stop_reason(self) -> str:
        return self._stop.poll() if self._records is not None else self._stop.poll_signals()


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
