"""The loss on a held-out chunk: the same pictures, captions, timesteps and noise at every step of a run.

Nothing of it depends on the number of ranks, on the step, or on which other pictures are held out, so that a curve may
be compared over the whole run, and between runs of one seed. What is trained is left as it was: no gradient, no random
number drawn, no table updated, no counter moved.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import torch
from torch import nn

from sharding.chunk import Chunk, open_chunk
from sharding.config import ConfigError
from sharding.schema import Workspace
from training.batch_plan import BatchPlan, MicroBatch, make_batch_plan
from training.chunk_data import Batch, ChunkData, ChunkSource, make_loader
from training.config import RunConfig
from training.latents.ahead import ahead_of
from training.plans import bucket_settings, still_caption_settings, still_pixel_settings
from training.position import Position
from training.randomness import SampleIdentity
from training.rank import Rank
from training.timestep_bands import NUM_BANDS, centre, mean_by_band
from training.trained import Trained

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measured:
    """One picture's loss. concept: its concept, or its dataset."""

    key: str
    concept: str
    timestep: float
    loss: float


class Validation:
    """See the module. Made on every rank, before networks are loaded; without `validation.chunk` it does nothing.

    Raises ConfigError when the chunk is not held out, ChunkError when it is not there or damaged.
    """

    def __init__(self, rank: Rank) -> None:
        self._rank, self._config = rank, rank.config
        self._data: ChunkData | None = None
        if self._config.validation.chunk is None:
            return
        chunk = held_out_chunk(self._config, self._config.validation.chunk)
        index, config = chunk.read_index(), self._config
        plan = validation_plan(index, chunk.name, config=config)
        pixels, captions = still_pixel_settings(config), still_caption_settings(config)
        self._data = ChunkData(
            ChunkSource.of_chunk(chunk),
            plan,
            rank=rank.engine.rank,
            world_size=rank.engine.world_size,
            captions=captions,
            pixels=pixels,
            with_checksum=config.data.verify_shards == "each_use",
            ahead=ahead_of(index, [plan], config=config, pixels=pixels, captions=captions, from_main=rank.from_main),
        )
        if rank.is_main:
            self._warn_if_changed(plan)

    def run(self, trained: Trained, position: Position) -> str:
        """Validate the weights that are shown and record the losses; every rank has to call it.

        Nothing happens when metrics.jsonl has this step's validation, as after a kill behind it. Returns why the ranks
        agreed to stop between two micro-batches, in which case nothing is recorded, or "".
        """
        rank = self._rank
        if self._data is None or rank.from_main(lambda: rank.records.is_validated(position)):  # type: ignore[union-attr]
            return ""
        started = time.monotonic()
        measured, reason = fixed_losses(rank, trained, self._data, timestep=fixed_timestep)
        if reason:
            return reason
        if rank.records is not None:
            row = metrics(measured, seconds=time.monotonic() - started)
            rank.records.validated(position, row)
            logger.info(
                "%s at global step %s: validation loss %.4f over %d images of %s in %.1f s",
                position.chunk, f"{position.global_step:,}", row["validation/loss"], row["validation/num_images"],
                self._config.validation.chunk, row["speed/validation_seconds"],
            )  # fmt: skip
        rank.engine.barrier()
        return ""

    def _warn_if_changed(self, plan: BatchPlan) -> None:
        """Remember in run.json which pictures are validated, and say aloud when they are others than before."""
        run_dir = self._rank.run_dir
        before = run_dir.read_run_json().get("validation", plan.digest)
        if before != plan.digest:
            logger.warning(
                "validation: %s gives other pictures or sizes than at the last launch (%s…, was %s…): from here on the "
                "curve is another one", plan.chunk, plan.digest[:12], before[:12],
            )  # fmt: skip
        run_dir.update_run_json(validation=plan.digest)


def fixed_losses(
    rank: Rank, trained: Trained, data: ChunkData, *, timestep: Callable[[SampleIdentity], float]
) -> tuple[list[Measured], str]:
    """Return the losses of the weights that are shown, of all ranks' pictures, and why the ranks agreed to stop, or "".

    data: this rank's share. Every rank has to call it. Pictures that cannot be used are left out, with a warning.
    """
    config = rank.config.data
    own: list[Measured] = []
    broken: list[tuple[str, str]] = []
    with trained.shown(), eval_mode(trained.model), torch.no_grad():
        for batch in make_loader(data, workers=config.workers, prefetch=config.prefetch):
            if reason := rank.agreed_stop():
                return [], reason
            timesteps = [timestep(identity) for identity in batch.identities]
            with rank.engine.autocast():
                losses = trained.recipe.loss(trained.model, batch, timesteps=timesteps)
            batch = batch.without(losses.broken)
            own += _measured(batch, timesteps, losses.per_sample)
            broken += batch.broken
    gathered = rank.engine.gather((own, broken))
    for key, reason in sorted({image for _, part in gathered for image in part}) if rank.is_main else ():
        logger.warning("measured without image %s: %s", key, reason)
    return [one for part, _ in gathered for one in part], ""


def _measured(batch: Batch, timesteps: Sequence[float], losses: torch.Tensor) -> list[Measured]:
    """Return the losses (B,) of a batch that count."""
    if batch.is_padding:
        return []
    slots = zip(
        batch.identities, batch.datasets, timesteps, losses.double().tolist(), batch.is_broken.tolist(), strict=True
    )
    return [
        Measured(identity.key, identity.concept or dataset, timestep, loss)
        for identity, dataset, timestep, loss, broken in slots
        if not broken
    ]


def validation_plan(index: pa.Table, chunk: str, *, config: RunConfig) -> BatchPlan:
    """Return one step of all micro-batches: of each picture one showing of weight 1, of max_images of them.

    Which pictures is counted from seed and key, so that adding to the chunk changes few of them.
    """
    keys = index.column("key").to_pylist()
    digests = [SampleIdentity(config.seed, 0, chunk, key).digest("validation") for key in keys]
    rows = sorted(sorted(range(len(keys)), key=digests.__getitem__)[: config.validation.max_images])
    chosen = index.select(["key", "width", "height"]).take(pa.array(rows, pa.int64()))
    ones = pa.array([1] * len(rows))
    plan = make_batch_plan(
        chosen.append_column("repeats", ones).append_column("loss_weight", ones.cast(pa.float64())),
        bucket_settings=bucket_settings(config),
        micro_batch_size=config.batch.micro_batch_size,
        micro_batches_per_step=max(len(rows), 1),
        seed=config.seed,
        epoch=0,
        chunk=chunk,
    )
    step = plan.steps[0]
    return replace(plan, steps=(replace(step, micro_batches=tuple(_in_whole(m, rows) for m in step.micro_batches)),))


def _in_whole(micro_batch: MicroBatch, rows: Sequence[int]) -> MicroBatch:
    """Return the micro-batch with rows of the whole index."""
    return replace(micro_batch, samples=tuple(replace(each, row=rows[each.row]) for each in micro_batch.samples))


def fixed_timestep(identity: SampleIdentity) -> float:
    """Return the timestep of a picture, the same at every validation: the middle of one of ten bands."""
    return centre(int.from_bytes(identity.digest("validation timestep"), "little") % NUM_BANDS)


def metrics(measured: Sequence[Measured], *, seconds: float) -> dict[str, Any]:
    """Return what metrics.jsonl gets; sums do not depend on the order. NaN when no picture could be read."""
    total = math.fsum(one.loss for one in measured)
    return {
        "validation/loss": total / len(measured) if measured else math.nan,
        **mean_by_band(((one.timestep, one.loss) for one in measured), "validation/timestep_"),
        "validation/num_images": len(measured),
        "speed/validation_seconds": seconds,
    }


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Put a module and all in it into eval mode, and each back into the mode it was in."""
    modes = [(each, each.training) for each in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for each, was_training in modes:
            each.training = was_training


def held_out_chunk(config: RunConfig, name: str) -> Chunk:
    """Return a chunk of the workspace. Raises ConfigError when it is not held out, ChunkError when it is not there."""
    chunk = open_chunk(Workspace(config.data.workspace).chunks / name)
    if not chunk.info.is_held_out:
        raise ConfigError(
            f"chunk {name}: is not held out, so it may be trained; set plan.held_out when building the "
            "workspace, and name a chunk DATASET/held-out"
        )
    return chunk
