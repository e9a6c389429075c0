"""The verdict's losses: of trained and of held-out pictures, per concept, at fixed timesteps and with fixed noise."""

import logging
import time
from collections.abc import Mapping
from dataclasses import replace

import pyarrow as pa

from sharding.chunk import Chunk
from sharding.config import ConfigError
from sharding.schema import Workspace
from training.chunk_data import ChunkData, ChunkSource
from training.dreambooth.verdict.curves import GAP, HELD_OUT, PRIOR, TRAINED
from training.dreambooth.verdict.limits import Measure
from training.dreambooth.verdict.selection import CLASS_SUFFIX, base_plans, fixed_plan, group_of, means, timestep_of
from training.latents.ahead import ahead_of
from training.loading.colour import ColourJitter
from training.plans import caption_settings, pixel_settings, still_caption_settings, still_pixel_settings
from training.rank import Rank
from training.stages import CONCEPTS
from training.started_chunk import StartedChunk
from training.trained import Trained
from training.validation import fixed_losses, held_out_chunk, validation_plan

logger = logging.getLogger(__name__)

HELD_OUT_CHUNK = f"{CONCEPTS}/held-out"


class VerdictLosses:
    """See the module. Made on every rank, before networks are loaded. names: of the trained concepts.

    Raises as `training.validation.Validation` does, and ConfigError where captions that change are encoded ahead.
    """

    def __init__(self, rank: Rank, chunk: StartedChunk, measure: Measure) -> None:
        self._rank, self._config, self._measure = rank, rank.config, measure
        if self._config.latents.text and caption_settings(self._config) != still_caption_settings(self._config):
            raise ConfigError("latents.text: the verdict needs captions that never change; set it to false")
        index = chunk.read_index()
        self.names = sorted({name for name in group_of(index) if not name.endswith(CLASS_SUFFIX)})
        self._trained = self._data(index, chunk, is_held_out=False)
        held_out = self._held_out()
        self._held_out_data: ChunkData | None = None
        if held_out is not None:
            self._held_out_data = self._data(held_out.read_index(), held_out, is_held_out=True)

    def run(self, trained: Trained) -> tuple[dict[str, float], str]:
        """Return what the charts get, and why the ranks agreed to stop meanwhile, or "". Every rank has to call it."""
        started, row = time.monotonic(), dict[str, float]()
        recipe = self._config.of_dreambooth
        timestep = timestep_of(self._measure.timesteps, between=recipe.timestep_range)
        for prefix, data in ((TRAINED, self._trained), (HELD_OUT, self._held_out_data)):
            if data is None:
                continue
            measured, reason = fixed_losses(self._rank, trained, data, timestep=timestep)
            if reason:
                return {}, reason
            row |= _named(means((one.concept, one.loss) for one in measured), prefix)
        for name in self.names:
            if TRAINED + name in row and HELD_OUT + name in row:
                row[GAP + name] = row[HELD_OUT + name] - row[TRAINED + name]
        return {**row, "speed/verdict_seconds": time.monotonic() - started}, ""

    def _held_out(self) -> Chunk | None:
        config = self._config
        if not (Workspace(config.data.workspace).chunks / HELD_OUT_CHUNK).is_dir():
            return None
        if (config.latents.use or config.latents.text) and config.validation.chunk != HELD_OUT_CHUNK:
            logger.warning("verdict: %s is not measured: set validation.chunk to it and encode it, too", HELD_OUT_CHUNK)
            return None
        return held_out_chunk(config, HELD_OUT_CHUNK)

    def _data(self, index: pa.Table, chunk: Chunk, *, is_held_out: bool) -> ChunkData:
        config, rank = self._config, self._rank
        captions = still_caption_settings(config)
        if is_held_out:
            pixels, plans = still_pixel_settings(config), [validation_plan(index, chunk.name, config=config)]
        else:
            pixels, plans = pixel_settings(config), base_plans(index, chunk.name, config=config)
        ahead = ahead_of(index, plans, config=config, pixels=pixels, captions=captions, from_main=rank.from_main)
        plan = fixed_plan(
            plans,
            group_of(index),
            seed=config.seed,
            pictures_per_group=self._measure.pictures_per_concept,
            num_timesteps=len(self._measure.timesteps),
            micro_batch_size=config.batch.micro_batch_size,
        )
        return ChunkData(
            ChunkSource.of_chunk(chunk),
            plan,
            rank=rank.engine.rank,
            world_size=rank.engine.world_size,
            captions=captions,
            pixels=replace(pixels, flip_fraction=0.0, colour_jitter=ColourJitter()),
            with_checksum=config.data.verify_shards == "each_use",
            ahead=ahead,
        )


def _named(means: Mapping[str, float], prefix: str) -> dict[str, float]:
    """Return the means by chart; those of trained class pictures have one of their own, held-out ones none."""
    row = {prefix + name: value for name, value in means.items() if not name.endswith(CLASS_SUFFIX)}
    if prefix == TRAINED:
        classes = {name: value for name, value in means.items() if name.endswith(CLASS_SUFFIX)}
        row |= {PRIOR + name.removesuffix(CLASS_SUFFIX): value for name, value in classes.items()}
    return row
