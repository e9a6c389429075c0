"""The batch plans of a chunk, one per epoch, and this rank's batches from them."""

from collections.abc import Iterator
from itertools import islice

from training.batch_plan import BatchPlan
from training.chunk_data import Batch, ChunkData, ChunkSource, make_loader
from training.fork import settings_of
from training.latents.ahead import ahead_of
from training.plans import batch_plan, caption_settings, pixel_settings
from training.position import Position
from training.rank import Rank
from training.started_chunk import StartedChunk
from training.state_folder import LoadedState
from training.state_manifest import StateError


class ChunkPlans:
    """See the module. digests: of the plans, in order; a state holds them. Every rank has to make one.

    Raises LatentsError when something should have been encoded ahead and is not.
    """

    def __init__(self, rank: Rank, chunk: StartedChunk) -> None:
        self._chunk = chunk
        self._config = config = rank.config
        self._engine = rank.engine
        self._captions, self._pixels = caption_settings(config), pixel_settings(config)
        index, epochs = chunk.read_index(), range(config.data.epochs)
        planned_with = rank.from_main(
            lambda: [settings_of(rank.ledger.lines, config, chunk.name, epoch) for epoch in epochs]
        )
        self.plans: list[BatchPlan] = [
            batch_plan(index, chunk.name, config=planned_with[epoch], epoch=epoch) for epoch in epochs
        ]
        self.digests = [plan.digest for plan in self.plans]
        self._ahead = ahead_of(
            index, self.plans, config=config, pixels=self._pixels, captions=self._captions, from_main=rank.from_main
        )

    def require_same(self, state: LoadedState) -> None:
        """Raise StateError unless a state of this chunk was trained with these plans; more epochs may follow."""
        saved = state.facts["plan_digests"]
        if saved != self.digests[: len(saved)]:
            raise StateError(
                f"chunk {self._chunk.name}: the batch plan is not the one that {state.folder} was trained with "
                "(index, batch, bucket or seed settings changed); put them back to finish this chunk"
            )

    def begin(self, position: Position) -> Position:
        """Return the position with which training goes on: the end of an epoch is the start of the next."""
        is_at_end = position.epoch < len(self.plans) and position.step == len(self.plans[position.epoch].steps)
        return position.next_epoch() if is_at_end else position

    def is_over(self, position: Position) -> bool:
        """Tell whether no epoch is left there."""
        return position.epoch >= len(self.plans)

    def batches(self, start: Position) -> Iterator[Iterator[Batch]]:
        """Yield one iterator of this rank's batches per epoch that is left, from a position on.

        The same workers load all of them, so that an epoch may be short.
        """
        left = self.plans[start.epoch :]
        if not left:
            return
        data = ChunkData(
            ChunkSource.of_chunk(self._chunk),
            left[0],
            later=left[1:],
            rank=self._engine.rank,
            world_size=self._engine.world_size,
            first_step=start.step,
            first_global_step=start.global_step - start.step,
            captions=self._captions,
            pixels=self._pixels,
            with_checksum=self._config.data.verify_shards == "each_use",
            ahead=self._ahead,
        )
        batches = iter(make_loader(data, workers=self._config.data.workers, prefetch=self._config.data.prefetch))
        for num_items in data.num_items:
            if num_items:
                yield islice(batches, num_items)

    def require_all_accounted_for(self, position: Position) -> None:
        """Raise StateError unless each planned image was trained, passed over or broken: a done chunk says so."""
        planned = sum(plan.num_images for plan in self.plans)
        counts = (position.chunk_images_trained, position.chunk_images_skipped, position.chunk_images_broken)
        if sum(counts) != planned:
            raise StateError(
                f"chunk {self._chunk.name}: {planned:,} images were planned, but {counts[0]:,} trained + "
                f"{counts[1]:,} skipped + {counts[2]:,} broken are {sum(counts):,}; the state does not fit the plan"
            )
