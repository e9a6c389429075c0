"""One chunk on one rank: from the state that it starts from to its `chunk_done` line.

    ChunkRun(…)   the run's copy of the chunk, the state to start from, the plans; loader workers start
    train         load the state, train what is left of the plans, begin to write the final state
    finish        previews, weights, complete.json, the `chunk_done` line

Every rank does all of it; what is written is rank 0's. The rest of a launch is `training.session`'s.
"""

import logging
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from sharding.chunk import Chunk, ChunkError
from sharding.files import free_bytes
from training.chunk_data import Batch, ChunkData, ChunkSource, make_loader
from training.chunk_records import chunk_records, steps_to_pass_over
from training.errors import NonFiniteError
from training.exit_codes import DONE, STOPPED
from training.forecast import disk_forecast, folder_bytes
from training.latents.ahead import ahead_of
from training.loading.remote import fetch_chunk
from training.loop import train_epoch
from training.plans import batch_plan, caption_settings, pixel_settings
from training.position import Position
from training.precision import DTYPES
from training.preview import write_pictures
from training.preview_prompts import preview_prompts
from training.rank import Rank
from training.retention import retain_exports, retain_finals
from training.start_state import first_position, state_before, state_to_start_from
from training.started_chunk import StartedChunk
from training.state import check_room, help_snapshot, state_bytes, take_snapshot
from training.state_folder import LoadedState, StateError, load_state, read_manifest, remove_states
from training.step_report import StepReport
from training.tensor_parts import brought_together
from training.trained import Trained
from training.validation import Validation

logger = logging.getLogger(__name__)


class ChunkRun:
    """See the module. number: the chunk's place in the run. after: where its parent has just ended in this process.

    Raises ChunkError, StateError, ConfigError.
    """

    def __init__(self, rank: Rank, chunk: Chunk, number: int, *, after: Position | None = None) -> None:
        self._rank = rank
        self._config = rank.config
        self._run_dir = rank.run_dir
        self._number = number
        self._trained: Trained | None = None
        self.position = Position(chunk=chunk.name)
        """Where training stands; after an error, where it was last known to stand."""

        fetch_chunk(self._config.data, chunk)
        self._chunk = self._copy_of(chunk)
        folder = rank.from_main(lambda: state_to_start_from(rank, chunk.name)) if after is None else None
        self._state: LoadedState | None = load_state(folder, is_verified=True) if folder is not None else None
        self.position = self._first_position(after) if after is not None else self._start_position(self._state)
        self._parent_folder = rank.run_dir.final_folder(after.chunk) if after is not None else None
        self._make_plans()
        self._prompts = rank.from_main(lambda: preview_prompts(rank.config, rank.run_dir, chunk=chunk.name))
        self._validation = Validation(rank)
        self._batches = self._iterate_batches()
        self._loader = next(self._batches, None)  # its workers start while the networks load

    def _copy_of(self, chunk: Chunk) -> StartedChunk:
        started = self._run_dir.start_chunk(chunk) if self._rank.is_main else None
        self._rank.engine.barrier()
        started = started or self._run_dir.started_chunk(chunk.name, chunk_folder=chunk.folder)
        if started is None:
            raise ChunkError(
                f"chunk {chunk.name}: rank 0 copied it to {self._run_dir.root}, this rank cannot see it there"
            )
        return started

    def _make_plans(self) -> None:
        index, name = self._chunk.read_index(), self._chunk.name
        epochs = range(self._config.data.epochs)
        self._plans = [batch_plan(index, name, config=self._config, epoch=epoch) for epoch in epochs]
        self._plan_digests = [plan.digest for plan in self._plans]
        self._ahead = ahead_of(
            index, self._plans, config=self._config, pixels=pixel_settings(self._config),
            captions=caption_settings(self._config), from_main=self._rank.from_main,
        )  # fmt: skip
        state = self._state
        saved = state.facts["plan_digests"] if state is not None and self._is_own(state) else []
        if state is not None and saved != self._plan_digests[: len(saved)]:  # more epochs may follow
            raise StateError(
                f"chunk {name}: the batch plan is not the one that {state.folder} was trained with "
                "(index, batch, bucket or seed settings changed); put them back to finish this chunk"
            )
        position = self.position
        if position.epoch < len(self._plans) and position.step == len(self._plans[position.epoch].steps):
            self.position = position.next_epoch()  # stopped at its end

    def _iterate_batches(self) -> Iterator[Iterator[Batch]]:
        """Yield one iterator of batches per epoch that is left, from the position on."""
        start, engine = self.position, self._rank.engine
        first_global_step = start.global_step - start.step
        for plan in self._plans[start.epoch :]:
            data = ChunkData(
                ChunkSource.of_chunk(self._chunk),
                plan,
                rank=engine.rank,
                world_size=engine.world_size,
                first_step=start.step if plan.epoch == start.epoch else 0,
                first_global_step=first_global_step,
                captions=caption_settings(self._config),
                pixels=pixel_settings(self._config),
                with_checksum=self._config.data.verify_shards == "each_use",
                ahead=self._ahead,
            )
            first_global_step += len(plan.steps)
            if len(data):
                yield iter(make_loader(data, workers=self._config.data.workers, prefetch=self._config.data.prefetch))

    def _is_own(self, state: LoadedState) -> bool:
        chunk: str = state.facts["position"]["chunk"]
        return chunk == self._chunk.name

    def _start_position(self, state: LoadedState | None) -> Position:
        """Return where to go on: inside this chunk, or at its start with the counters of its parent."""
        if state is None:
            return Position(chunk=self._chunk.name)
        position = Position(**state.facts["position"])
        return position if self._is_own(state) else self._first_position(position)

    def _first_position(self, base: Position) -> Position:
        name = self._chunk.name
        return self._rank.from_main(lambda: first_position(self._rank.ledger.lines, name, base))

    # --- training ---

    def train(self, trained: Trained) -> int:
        """Train to the end of the chunk and begin to write its final state, or stop with one; return 0 or 75."""
        self._trained = trained
        if self._state is not None:
            trained.load(self._state)
            position = self.position
            logger.info(
                "resuming at chunk %s, epoch %d, step %d (global step %s) from %s",
                position.chunk, position.epoch, position.step, f"{position.global_step:,}", self._state.folder,
            )  # fmt: skip
        elif self._parent_folder is None:
            logger.info("chunk %s: starting from the weights that the config names", self._chunk.name)
        self._tell_start(trained)
        if reason := self._rank.agreed_stop():  # while networks were loading: there is nothing new to save
            return self._finish_stopped(reason)
        while True:
            try:
                reason = self._train_epochs(trained)
                break
            except NonFiniteError as error:
                self._roll_back(trained, error)
        if reason:
            return self._finish_stopped(reason)
        self._require_all_accounted_for()
        final = self._run_dir.final_folder(self._chunk.name)
        state = self._state
        if state is None or state.folder != final or state.manifest.global_step != self.position.global_step:
            self._save(final)
        return DONE

    def _tell_start(self, trained: Trained) -> None:
        if self._rank.records is not None:
            self._rank.records.start_chunk(
                self._chunk, self._plans, number=self._number, position=self.position,
                resumed_from=self._state.folder if self._state is not None else self._parent_folder,
                machine=self._rank.machine, frozen_weights=trained.recipe.frozen_digests,
            )  # fmt: skip
            self._retain()
            logger.info(self._disk_forecast(trained))
        num_present = len(self._run_dir.state_folders(self._chunk.name))
        num_bytes, keep_last = state_bytes(trained.tensors()), self._config.save.keep_states
        logger.info(check_room(self._run_dir.root, num_bytes, keep_last=keep_last, num_present=num_present))

    def _disk_forecast(self, trained: Trained) -> str:
        tensors, config, root = trained.tensors(), self._config, self._run_dir.root
        forecast = disk_forecast(
            config,
            num_chunks=len(self._run_dir.read_run_json().get("chunks", [self._chunk.name])),
            num_steps=sum(len(plan.steps) for plan in self._plans),
            num_images=sum(plan.num_images for plan in self._plans),
            index_bytes=self._chunk.index_path.stat().st_size,
            num_tensors=sum(len(named) for named in tensors.values()),
            state_bytes=state_bytes(tensors),
            num_parameters=state_bytes({"model": tensors["model"]}) // DTYPES[config.precision.weights].itemsize,
            prompts=self._prompts,
        )
        return forecast.text(free_bytes=free_bytes(root), used_bytes=folder_bytes(root))

    def _train_epochs(self, trained: Trained) -> str:
        pass_over = self._rank.from_main(lambda: steps_to_pass_over(self._rank.ledger.lines, self._chunk.name))
        while self._loader is not None:
            self.position, reason = train_epoch(
                self._plans[self.position.epoch], self._loader, position=self.position, config=self._config,
                trained=trained, recorder=self, pass_over=pass_over,
            )  # fmt: skip
            if reason:
                return reason
            self.position = self.position.next_epoch()
            self._loader = next(self._batches, None)
        return ""

    def _roll_back(self, trained: Trained, error: NonFiniteError) -> None:
        """Go back to the last state from before the trouble; its steps are not tried again. Once per chunk.

        The trouble is the steps without a finite update and the update before them. Raises `error` when it happens
        again, and when there is no state to go back to.
        """
        rank, name = self._rank, self._chunk.name
        rank.saver.drain()
        folder = rank.from_main(lambda: state_before(rank, name, step=error.steps.start - 1))
        if folder is None:
            raise error
        state = load_state(folder, is_verified=True)
        failed_at, self.position = self.position, self._start_position(state)
        if rank.records is not None:
            pass_over = range(error.steps.start - 1, error.steps.stop)
            rank.records.rolled_back(failed_at, self.position, folder=state.folder, pass_over=pass_over)
            own = self._run_dir.state_folders(name)
            remove_states([one for one in own if read_manifest(one).global_step > self.position.global_step])
        rank.engine.barrier()
        trained.load(state)
        self._state = state
        self._batches = self._iterate_batches()
        self._loader = next(self._batches, None)

    def _finish_stopped(self, reason: str) -> int:
        self._rank.saver.drain()
        if self._rank.records is not None:
            self._rank.records.stopped(self.position, reason)
        self._rank.engine.barrier()
        return STOPPED

    # --- the end ---

    def finish(self) -> int:
        """Make previews and weights while the final state is written, then say that the chunk is done."""
        name, config, rank = self._chunk.name, self._config, self._rank
        reason = self.preview(self.position) if config.preview.at_chunk_end else ""
        if config.validation.at_chunk_end and not reason:
            reason = self.validate(self.position)
        rank.saver.drain()
        if reason := reason or rank.agreed_stop():
            return self._finish_stopped(reason)  # the final state is there: the next launch makes these again
        every = config.save.export_every_chunks
        if every and (self._number + 1) % every == 0:
            self._export()
        if rank.records is not None:
            final = self._run_dir.final_folder(name)
            rank.records.chunk_done(self._chunk, self.position, final=final, plan_digests=self._plan_digests)
            self._retain()
        rank.engine.barrier()
        return DONE

    def _require_all_accounted_for(self) -> None:
        """Raise StateError unless each planned image was trained, passed over or broken: a done chunk says so."""
        position, planned = self.position, sum(plan.num_images for plan in self._plans)
        counts = (position.chunk_images_trained, position.chunk_images_skipped, position.chunk_images_broken)
        if sum(counts) != planned:
            raise StateError(
                f"chunk {self._chunk.name}: {planned:,} images were planned, but {counts[0]:,} trained + "
                f"{counts[1]:,} skipped + {counts[2]:,} broken are {sum(counts):,}; the state does not fit the plan"
            )

    def _export(self) -> None:
        assert self._trained is not None
        with self._trained.shown():
            in_parts = self._rank.engine.weights_in_parts()
            weights = brought_together(in_parts, is_kept=self._rank.is_main) if in_parts is not None else None
            if self._rank.records is not None:
                metadata = {
                    "chunkline.run": self._run_dir.read_run_json()["run_id"],
                    "chunkline.chunk": self._chunk.name,
                    "chunkline.global_step": str(self.position.global_step),
                    "chunkline.images_seen": str(self.position.images_seen),
                }
                folder, dtype = self._run_dir.weights_folder(self._chunk.name), DTYPES[self._config.save.export_dtype]
                for file in self._trained.recipe.export(folder, dtype=dtype, metadata=metadata, weights=weights):
                    logger.info("weights %s", file)
        self._rank.engine.barrier()

    def _retain(self) -> None:
        """Remove states and weights of finished chunks that newer ones stand in for, also where a kill came first."""
        save, records = self._config.save, chunk_records(self._rank.ledger.lines)
        retain_finals(
            records, self._run_dir, keep_chunks=save.keep_chunks, keep_every_chunks=save.keep_every_chunks,
            trusted=self._rank.saver.trusted,
        )  # fmt: skip
        retain_exports(records, self._run_dir, keep_exports=save.keep_exports)

    # --- what the loop tells (training.loop.Recorder) ---

    def step_done(self, report: StepReport) -> None:
        self.position = report.after
        if self._rank.records is not None:
            self._rank.records.step_done(report)

    def save(self, position: Position) -> None:
        self._save(self._run_dir.state_folder(position.chunk, position.global_step))

    def _save(self, folder: Path) -> None:
        """Begin to save a state in `folder`: every rank gives its parts, rank 0 copies and writes it."""
        assert self._trained is not None
        if self._rank.records is None:
            help_snapshot(self._trained.tensors())
            return
        self._rank.saver.drain()  # two copies in memory would be one too many
        self._rank.records.before_save()
        facts = {
            "global_step": self.position.global_step,
            "position": asdict(self.position),
            "plan_digests": self._plan_digests,
            "chunk_digest": self._chunk.info.digest,
            **self._trained.facts(),
        }
        self._rank.saver.save(folder, take_snapshot(self._trained.tensors(), facts))

    def poll(self) -> None:
        if self._rank.records is not None:
            self._rank.saver.poll()
            self._rank.records.feed_trackers()

    def preview(self, position: Position) -> str:
        """Make previews on every rank, in eval mode and the run's compute format; rank 0 writes them when all are made.

        Returns why the ranks agreed to stop between two of them, or "".
        """
        assert self._trained is not None
        pictures = []
        with self._trained.shown():
            for prompt in self._prompts:
                if reason := self._rank.agreed_stop():
                    return reason
                with self._rank.engine.autocast():
                    pictures += self._trained.recipe.preview([prompt])
        if pictures and self._rank.records is not None:
            folder = self._run_dir.previews_folder(position.chunk)
            write_pictures(folder, position.global_step, pictures, self._prompts)
        self._rank.engine.barrier()
        return ""

    def validate(self, position: Position) -> str:
        """Record the loss of held-out pictures; returns as `preview`."""
        assert self._trained is not None
        return self._validation.run(self._trained, position)

    def stop_reason(self) -> str:
        return self._rank.stop_reason()
