"""One chunk on one rank: from the state that it starts from to its `chunk_done` line.

    ChunkRun(…)   the run's copy of the chunk, the state to start from, the plans; loader workers start
    train         load the state, train what is left of the plans, begin to write the final state
    finish        previews, weights, complete.json, the `chunk_done` line

Every rank does all of it; what is written is rank 0's. The rest of a launch is `training.session`'s.
"""

import logging

from sharding.chunk import Chunk, ChunkError
from training.carry_over import carry_over_to
from training.chunk_files import ChunkFiles
from training.chunk_plans import ChunkPlans
from training.chunk_records import steps_to_pass_over
from training.config import RunConfig
from training.errors import LossSpikeError, TroubleError
from training.exit_codes import DONE, STOPPED
from training.kept_states import remove_states
from training.loading.remote import fetch_chunk
from training.loop import train_epoch
from training.position import Position
from training.rank import Rank
from training.spikes import Spike, SpikeWatch
from training.start_state import first_position, state_before, state_to_start_from, states_before
from training.started_chunk import StartedChunk
from training.state_folder import LoadedState, load_state
from training.state_manifest import read_manifest
from training.step_report import StepReport
from training.trained import Trained
from training.watching import Watching

logger = logging.getLogger(__name__)


class ChunkRun:
    """See the module. number: the chunk's place in the run. after: where its parent has just ended in this process.

    Raises ChunkError, StateError, ConfigError.
    """

    def __init__(self, rank: Rank, chunk: Chunk, number: int, *, after: Position | None = None) -> None:
        self._rank = rank = rank.of_chunk(chunk.name)
        self._config = rank.config
        self._run_dir = rank.run_dir
        self._number = number
        self._trained: Trained | None = None
        self.position = Position(chunk=chunk.name)
        """Where training stands; after an error, where it was last known to stand."""

        fetch_chunk(self._config.data, chunk, held_out=self._config.validation.chunk)
        self._chunk = self._copy_of(chunk)
        self._plans = ChunkPlans(rank, self._chunk)
        if after is None:
            folder = rank.from_main(lambda: state_to_start_from(rank, chunk.name))
            self._state: LoadedState | None = load_state(folder, is_verified=True) if folder is not None else None
            self._parent_folder = None
            self.position = self._start_position(self._state)
        else:
            self._state, self._parent_folder = None, rank.run_dir.final_folder(after.chunk)
            self.position = self._first_position(after)
        self._files = ChunkFiles(rank, self._chunk, self._plans, number)
        self._watching = Watching(rank, chunk.name)
        self._start_batches()  # workers start while the networks load

    @property
    def config(self) -> RunConfig:
        """The settings of this chunk."""
        return self._config

    def _copy_of(self, chunk: Chunk) -> StartedChunk:
        started = self._run_dir.start_chunk(chunk) if self._rank.is_main else None
        self._rank.engine.barrier()
        started = started or self._run_dir.started_chunk(chunk.name, chunk_folder=chunk.folder)
        if started is None:
            raise ChunkError(
                f"chunk {chunk.name}: rank 0 copied it to {self._run_dir.root}, this rank cannot see it there"
            )
        return started

    def _start_batches(self) -> None:
        self._batches = self._plans.batches(self.position)
        self._epoch_batches = next(self._batches, None)

    @property
    def _is_resumed(self) -> bool:
        """Whether the state that was loaded is this chunk's own."""
        return self._state is not None and self._state.facts["position"]["chunk"] == self._chunk.name

    def _start_position(self, state: LoadedState | None) -> Position:
        """Return where to go on: inside this chunk, or at its start with the counters of its parent."""
        if state is None:
            return Position(chunk=self._chunk.name)
        position = Position(**state.facts["position"])
        if position.chunk != self._chunk.name:
            return self._first_position(position)
        self._plans.require_same(state)
        return self._plans.begin(position)

    def _first_position(self, base: Position) -> Position:
        name = self._chunk.name
        return self._rank.from_main(lambda: first_position(self._rank.ledger.lines, name, base))

    # --- training ---

    def train(self, trained: Trained) -> int:
        """Train to the end of the chunk and begin to write its final state, or stop with one; return 0 or 75."""
        self._trained = trained
        if self._state is not None:
            self._load(trained, self._state)
            position = self.position
            logger.info(
                "resuming at chunk %s, epoch %d, step %d (global step %s) from %s",
                position.chunk, position.epoch, position.step, f"{position.global_step:,}", self._state.folder,
            )  # fmt: skip
        else:
            origin = self._parent_folder or "the weights that the config names"
            logger.info("chunk %s: starting from %s", self._chunk.name, origin)
        self._tell_start(trained)
        reason = self._rank.agreed_stop()  # while networks were loading: there is nothing new to save
        if not reason and not self._is_resumed:
            reason = self._watching.begin(trained, self.position)
        elif not reason and not self._plans.is_over(self.position):
            reason = self._watching.make(trained, self.position)  # a stop or a kill may have come before
        if reason:
            return self._finish_stopped(reason)
        while True:
            try:
                reason = self._train_epochs(trained)
                break
            except TroubleError as error:
                self._roll_back(trained, error)
        if reason:
            return self._finish_stopped(reason)
        self._plans.require_all_accounted_for(self.position)
        final = self._run_dir.final_folder(self._chunk.name)
        state = self._state
        if state is None or state.folder != final or state.manifest.global_step != self.position.global_step:
            self._files.save(trained, self.position, is_final=True)
        return DONE

    def _tell_start(self, trained: Trained) -> None:
        rank = self._rank
        if rank.records is not None:
            rank.records.start_chunk(
                self._chunk, self._plans.plans, number=self._number, position=self.position,
                resumed_from=self._state.folder if self._state is not None else self._parent_folder,
                machine=rank.machine, frozen_weights=trained.recipe.frozen_digests,
            )  # fmt: skip
            self._files.retain()
        self._files.require_room(trained, self._watching.prompts)
        self._watch_losses()

    def _watch_losses(self) -> None:
        """Judge the losses to come by those of the steps before them, over launches, too."""
        rank = self._rank
        losses = rank.from_main(lambda: rank.records.last_weighted_losses())  # type: ignore[union-attr]
        factor, batch_size = self._config.trackers.spike_factor, self._config.batch.batch_size
        self._spikes = SpikeWatch(factor=factor, batch_size=batch_size, losses=losses)

    def _train_epochs(self, trained: Trained) -> str:
        pass_over = self._rank.from_main(lambda: steps_to_pass_over(self._rank.ledger.lines, self._chunk.name))
        while self._epoch_batches is not None:
            self.position, reason = train_epoch(
                self._plans.plans[self.position.epoch], self._epoch_batches, position=self.position,
                config=self._config, trained=trained, recorder=self, pass_over=pass_over,
            )  # fmt: skip
            if reason:
                return reason
            self.position = self.position.next_epoch()
            self._epoch_batches = next(self._batches, None)
        return ""

    def _roll_back(self, trained: Trained, trouble: TroubleError) -> None:
        """Go back to the last state from before the trouble; its steps are not tried again. Once per chunk and reason.

        The trouble is the steps that it names and the update before them. Raises it when it happens again, and when
        there is no state to go back to.
        """
        rank, name = self._rank, self._chunk.name
        rank.saver.drain()
        before = trouble.steps.start - 1
        folder = rank.from_main(lambda: state_before(rank, name, step=before, reason=trouble.reason))
        if folder is None:
            raise trouble
        logger.warning("%s", trouble)
        state = load_state(folder, is_verified=True)
        failed_at, self.position = self.position, self._start_position(state)
        if rank.records is not None:
            rank.records.rolled_back(failed_at, self.position, folder=state.folder, trouble=trouble)
            own = self._run_dir.state_folders(name)
            remove_states([one for one in own if read_manifest(one).global_step > self.position.global_step])
        rank.engine.barrier()
        self._load(trained, state)
        self._state = state
        self._watch_losses()
        self._start_batches()

    def _load(self, trained: Trained, state: LoadedState) -> None:
        state_of = state.facts["position"]["chunk"]
        trained.load(state, carry_over=carry_over_to(self._config, self._chunk.name, state_of=state_of))

    def _finish_stopped(self, reason: str) -> int:
        self._rank.saver.drain()
        if self._rank.records is not None:
            at_end = self._plans.is_over(self._plans.begin(self.position))
            is_complete = self._watching.is_complete(self.position, at_end=at_end)
            self._rank.records.stopped(self.position, reason, is_complete=is_complete)
        self._rank.engine.barrier()
        return STOPPED

    # --- the end ---

    def finish(self) -> int:
        """Make previews and weights while the final state is written, then say that the chunk is done."""
        assert self._trained is not None
        name, rank = self._chunk.name, self._rank
        reason = self._watching.make(self._trained, self.position, at_end=True)
        rank.saver.drain()
        if reason := reason or rank.agreed_stop():
            return self._finish_stopped(reason)  # the final state is there: the next launch goes on here
        self._files.export(self._trained, self.position)
        if rank.records is not None:
            final = self._run_dir.final_folder(name)
            rank.records.chunk_done(self._chunk, self.position, final=final, plan_digests=self._plans.digests)
            self._files.retain()
        rank.engine.barrier()
        return DONE

    # --- what the loop tells (training.loop.Recorder) ---

    def step_done(self, report: StepReport) -> None:
        self.position = report.after
        spike = self._spikes.take(report)
        if self._rank.records is not None:
            self._rank.records.step_done(report, spike)
        if spike is not None and self._config.trackers.on_spike == "rollback":
            self._go_back_if_possible(spike)

    def _go_back_if_possible(self, spike: Spike) -> None:
        """Raise LossSpikeError when the chunk has not gone back because of one before, and there is a state for it."""
        rank, name, step = self._rank, self._chunk.name, self.position.global_step
        rank.saver.drain()
        if rank.from_main(lambda: bool(states_before(rank, name, step=step - 1, reason=LossSpikeError.reason))):
            raise LossSpikeError(f"{name} global step {step:,}: {spike}", range(step, step + 1))

    def save(self, position: Position) -> None:
        assert self._trained is not None
        self._files.save(self._trained, position)

    def poll(self) -> None:
        if self._rank.records is not None:
            self._rank.saver.poll()
            self._rank.records.feed_trackers()

    def watch(self, position: Position) -> str:
        assert self._trained is not None
        return self._watching.make(self._trained, position)

    def stop_reason(self) -> str:
        return self._rank.stop_reason()
