"""What a chunk leaves in the run folder besides records: states and exported weights; and what goes for them.

Every rank has one; what is written is rank 0's. Whether there is room is asked before anything is written.
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict

from sharding.files import free_bytes
from training.chunk_plans import ChunkPlans
from training.chunk_records import chunk_records
from training.config import Prompt
from training.export_facts import export_facts
from training.exports import write_export
from training.forecast import DiskForecast, folder_bytes
from training.position import Position
from training.precision import DTYPES
from training.rank import Rank
from training.retention import retain_exports, retain_finals
from training.room import forecast_of, require_room, require_room_for_export
from training.started_chunk import StartedChunk
from training.state import help_snapshot, take_snapshot
from training.tensor_parts import brought_together
from training.trained import Trained

logger = logging.getLogger(__name__)


class ChunkFiles:
    """See the module. number: the chunk's place in the run, which says whether its weights are exported."""

    def __init__(self, rank: Rank, chunk: StartedChunk, plans: ChunkPlans, number: int) -> None:
        self._rank = rank
        self._save = rank.config.save
        self._run_dir = rank.run_dir
        self._chunk = chunk
        self._plans = plans
        every = self._save.export_every_chunks
        self._is_exported = every > 0 and (number + 1) % every == 0

    def require_room(self, trained: Trained, prompts: Sequence[Prompt]) -> None:
        """Log the forecast of the run. Raises DiskFullError, on all ranks, when the chunk's own files do not fit."""
        tensors = trained.tensors()
        updated = {name for parameter, name in trained.names.items() if parameter.requires_grad}

        def on_main() -> DiskForecast:
            root, name = self._run_dir.root, self._chunk.name
            forecast = forecast_of(
                self._rank.config, self._run_dir, chunk=self._chunk, plans=self._plans.plans, tensors=tensors,
                updated=updated, prompts=prompts,
            )  # fmt: skip
            logger.info(forecast.text(free_bytes=free_bytes(root), used_bytes=folder_bytes(root)))
            num_present, keep = len(self._run_dir.state_folders(name)), self._save.keep_states
            exports = self._is_exported
            logger.info(require_room(root, forecast, keep_states=keep, num_present=num_present, exports=exports))
            return forecast

        self._forecast = self._rank.from_main(on_main)

    def save(self, trained: Trained, position: Position, *, is_final: bool = False) -> None:
        """Begin to save a state that continues at `position`: every rank gives its parts, rank 0 copies and writes."""
        if self._rank.records is None:
            help_snapshot(trained.tensors())
            return
        run_dir, name = self._run_dir, self._chunk.name
        self._rank.saver.drain()  # two copies in memory would be one too many
        self._rank.records.before_save()
        facts = {
            "global_step": position.global_step,
            "position": asdict(position),
            "plan_digests": self._plans.digests,
            "chunk_digest": self._chunk.info.digest,
            **trained.facts(),
        }
        folder = run_dir.final_folder(name) if is_final else run_dir.state_folder(name, position.global_step)
        self._rank.saver.save(folder, take_snapshot(trained.tensors(), facts))

    def export(self, trained: Trained, position: Position) -> None:
        """Export the weights that are shown, where it is this chunk's turn. Raises DiskFullError as `write_export`."""
        if not self._is_exported:
            return
        rank, folder = self._rank, self._run_dir.weights_folder(self._chunk.name)
        rank.from_main(lambda: require_room_for_export(self._run_dir.root, self._forecast))
        with trained.shown():
            in_parts = rank.engine.weights_in_parts()
            weights = brought_together(in_parts, is_kept=rank.is_main) if in_parts is not None else None
            if rank.is_main:
                dtype = DTYPES[self._save.export_dtype]
                metadata = export_facts(
                    rank.config, self._run_dir, chunk=position.chunk, global_step=position.global_step,
                    images_seen=position.images_seen,
                )  # fmt: skip
                files = write_export(
                    folder,
                    lambda partial: trained.recipe.export(partial, dtype=dtype, metadata=metadata, weights=weights),
                    licences=self._save.licence_files,
                )
                logger.info("weights %s", ", ".join(map(str, files)))
        rank.engine.barrier()

    def retain(self) -> None:
        """Remove states and weights of finished chunks that newer ones stand in for, also where a kill came first.

        For rank 0.
        """
        save, records = self._save, chunk_records(self._rank.ledger.lines)
        retain_finals(
            records, self._run_dir, keep_chunks=save.keep_chunks, keep_every_chunks=save.keep_every_chunks,
            trusted=self._rank.saver.trusted,
        )  # fmt: skip
        retain_exports(records, self._run_dir, keep_exports=save.keep_exports)
