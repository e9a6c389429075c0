"""Which parts of which chunks a task of `encode-latents` makes.

Chunk by chunk, so that of a long run one chunk's list is in memory. Part p of a chunk belongs to task (f + p) modulo N,
f being a count of parts before the chunk that needs no index: all tasks agree on it without talking to each other.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sharding.chunk import Chunk, open_chunk
from sharding.config import ConfigError
from sharding.schema import Workspace
from training.campaign import chunk_range, read_campaign, require_in_campaign
from training.config import RunConfig
from training.config.latents import latent_problems, text_problems
from training.latents.parts import problems_of
from training.latents.store import Store, latent_store, text_store
from training.latents.wanted import Wanted, WantedCaptions, num_parts, wanted_captions, wanted_pictures
from training.plans import batch_plan, bytes_per_value, caption_settings, latent_bytes
from training.run_dir import RunDir
from training.stages import epochs_of


@dataclass(frozen=True)
class ChunkWork:
    """What one task makes of one chunk: latents, or text outputs."""

    chunk: Chunk
    store: Store
    wanted: Wanted | WantedCaptions
    owned: tuple[int, ...]
    """Numbers of the task's parts."""

    @property
    def folder(self) -> Path:
        return self.store.chunk_folder(self.chunk.name, self.wanted.digest)

    @property
    def name(self) -> str:
        """Return it for people."""
        return f"{self.chunk.name} {self.store.kind}"

    @property
    def num_rows(self) -> int:
        """Latents or captions in the task's parts."""
        each = 2 if isinstance(self.wanted, Wanted) and self.wanted.with_flips else 1
        return each * sum(len(self.wanted.part(number)) for number in self.owned)

    def missing(self) -> list[int]:
        """Return the task's parts that have to be made: not there, of another size, or with another index."""
        return [number for number in self.owned if problems_of(self.folder, number, with_data=False)]

    def num_bytes(self, numbers: Sequence[int], config: RunConfig) -> int:
        """Return how much the values of some parts take."""
        if not isinstance(self.wanted, Wanted):
            from training.recipes.encoders import values_per_caption  # imports torch

            num_captions = sum(len(self.wanted.part(number)) for number in numbers)
            return num_captions * values_per_caption(config) * bytes_per_value(self.store.dtype)
        pictures = (one for number in numbers for one in self.wanted.part(number))
        num_bytes = sum(latent_bytes(one.placement.bucket, config=config) for one in pictures)
        return num_bytes * (2 if self.wanted.with_flips else 1)


def chunks_to_encode(
    config: RunConfig, run_dir: RunDir | None, *, chunk_name: str | None = None, chunks: str | None = None
) -> list[Chunk]:
    """Return the chunks that are asked for; by default all of the run that are not done, and the validation's.

    A chunk that the run has started is the run's copy. Raises ConfigError, ChunkError.
    """
    campaign = read_campaign(config.data.workspace, config.data.chunks, run_dir, epochs=epochs_of(config))
    held_out = config.validation.chunk
    if chunk_name is not None and chunks is not None:
        raise ConfigError("--chunk and --chunks exclude each other")
    if chunk_name is not None:
        if chunk_name != held_out:
            require_in_campaign(chunk_name, campaign.names)
        names = [chunk_name]
    elif chunks is not None:
        names = chunk_range(campaign.names, chunks)
    else:
        names = [name for name in campaign.names if not campaign.is_done(name)]
        names += [held_out] if held_out is not None else []

    def chunk_of(name: str) -> Chunk:
        if name == held_out:
            return open_chunk(Workspace(config.data.workspace).chunks / name)
        started = run_dir.started_chunk(name, check_shards=False) if run_dir is not None else None
        return started or campaign.chunk(name)

    return [chunk_of(name) for name in names]


def require_possible(config: RunConfig, *, with_text: bool) -> None:
    """Raise ConfigError, saying why, when what the settings ask for cannot be encoded ahead."""
    problems = [*latent_problems(config), *(text_problems(config) if with_text else ())]
    if problems:
        raise ConfigError(f"encode-latents: {'; '.join(problems)}")


def work_of(
    chunks: Sequence[Chunk], *, config: RunConfig, with_text: bool, part_index: int, num_parts_of_all: int
) -> Iterator[ChunkWork]:
    """Yield the work of task `part_index` of `num_parts_of_all`, in the order of the chunks.

    Raises ValueError for a task that is none; nothing is guessed from a scheduler.
    """
    if num_parts_of_all < 1 or not 0 <= part_index < num_parts_of_all:
        raise ValueError(
            f"--part-index {part_index} is outside 0 … {num_parts_of_all - 1}: check --num-parts {num_parts_of_all}"
        )
    before = 0
    for chunk in chunks:
        showings = epochs_of(config)(chunk.name) if config.batch.remainder == "merge" else 1  # places of a picture
        first, most = (part_index - before) % num_parts_of_all, num_parts(chunk.info.num_samples * showings)
        before += most
        if first < most:
            for store, wanted in _wanted_of(chunk, config, with_text=with_text):
                owned = tuple(range(first, wanted.num_parts, num_parts_of_all))
                if owned:
                    yield ChunkWork(chunk, store, wanted, owned)


def _wanted_of(chunk: Chunk, config: RunConfig, *, with_text: bool) -> Iterator[tuple[Store, Wanted | WantedCaptions]]:
    index = chunk.read_index()
    if chunk.info.is_held_out:
        from training.validation import validation_plan  # imports torch

        plans, crop, with_flips = [validation_plan(index, chunk.name, config=config)], "centre", False
    else:
        differs = config.batch.remainder == "merge" or "every_epochs" in index.column_names
        epochs = range(epochs_of(config)(chunk.name) if differs else 1)  # else all show the same
        plans = [batch_plan(index, chunk.name, config=config, epoch=epoch) for epoch in epochs]
        crop, with_flips = config.data.crop, config.data.horizontal_flip
    pictures = wanted_pictures(index, plans, with_flips=with_flips, with_masks=crop == "focus")
    yield latent_store(config, crop=crop), pictures
    if with_text:
        yield text_store(config), wanted_captions(index, plans, settings=caption_settings(config))
